// The loops of the glu family. Included by each isa_*.cpp, inside its namespace.
//
// S is the compute type, T the storage type. Where gate and value take turns in memory (TURNS), two vectors are read
// and taken apart.

template <class S>
struct GateAndValue {
  Vec<S> gate, value;
};

template <class S>
CKPT_INLINE GateAndValue<S> take_apart(Vec<S> low, Vec<S> high) {
  return {shuffle<Evens>(low.v, high.v), shuffle<Odds>(low.v, high.v)};
}
template <class S>
CKPT_INLINE GateAndValue<S> put_together(Vec<S> gate, Vec<S> value) {
  return {shuffle<LowerInTurns>(gate.v, value.v), shuffle<UpperInTurns>(gate.v, value.v)};
}

template <bool turns, class S, class T>
CKPT_INLINE GateAndValue<S> load_pair_at(const T* gate, const T* value, int64_t j, Full<S> all) {
  if (!turns) return {load(gate + j, all), load(value + j, all)};
  return take_apart(load(gate + 2 * j, all), load(gate + 2 * j + Vec<S>::width, all));
}
template <bool turns, class S, class T>
CKPT_INLINE GateAndValue<S> load_pair_at(const T* gate, const T* value, int64_t j, Partial<S> lanes) {
  if (!turns) return {load(gate + j, lanes), load(value + j, lanes)};
  T padded[2 * Vec<S>::width] = {};
  for (int64_t i = 0; i < 2 * lanes.count; ++i) padded[i] = gate[2 * j + i];
  return load_pair_at<true, S>(padded, padded + 1, 0, Full<S>{});
}

template <bool turns, class S, class T, class Lanes>
CKPT_INLINE void store_pair_at(T* gate, T* value, int64_t j, GateAndValue<S> gradient, Lanes lanes) {
  if (!turns) {
    if (gate) store(gate + j, gradient.gate, lanes);
    if (value) store(value + j, gradient.value, lanes);
    return;
  }
  GateAndValue<S> both = put_together(gradient.gate, gradient.value);
  T mixed[2 * Vec<S>::width];
  store(mixed, both.gate, Full<S>{});
  store(mixed + Vec<S>::width, both.value, Full<S>{});
  const int64_t count = 2 * count_of(lanes);
  __builtin_memcpy(gate + 2 * j, mixed, count * sizeof(T));
}

template <bool turns, class S, class T>
void glu_forward_row(const GluForward& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = a.gate.row<const T>(row) + begin * a.step;
  const T* value = a.value.row<const T>(row) + begin * a.step;
  const Written<T> output(a.output, row, a.rows, a.columns);
  visit_activation(a.activation, [&](auto function) {
    step<S>(end - begin, [&](int64_t j, auto lanes) {
      GateAndValue<S> x = load_pair_at<turns, S>(gate, value, j, lanes);
      output.put(begin + j, value_of<T>(function, x.gate) * x.value, lanes);
    });
  });
  end_streams();
}

template <bool turns, class S, class T>
void glu_backward_row(const GluBackward& a, int64_t row, int64_t begin, int64_t end) {
  const T* gate = a.gate.row<const T>(row) + begin * a.step;
  const T* value = a.value.row<const T>(row) + begin * a.step;
  const T* grad_output = a.grad_output.row<const T>(row) + begin;
  T* grad_gate = a.grad_gate ? a.grad_gate.row<T>(row) + begin * a.step : nullptr;
  T* grad_value = a.grad_value ? a.grad_value.row<T>(row) + begin * a.step : nullptr;
  T* output = a.output ? a.output.row<T>(row) + begin : nullptr;
  visit_activation(a.activation, [&](auto function) {
    step<S>(end - begin, [&](int64_t j, auto lanes) {
      GateAndValue<S> x = load_pair_at<turns, S>(gate, value, j, lanes);
      Vec<S> g = load(grad_output + j, lanes), factor = value_of<T>(function, x.gate);
      store_pair_at<turns, S>(grad_gate, grad_value, j,
                              GateAndValue<S>{g * x.value * derivative_of<T>(function, x.gate), g * factor}, lanes);
      if (output) store(output + j, factor * x.value, lanes);
    });
  });
}

template <class S, class T>
void glu_forward(const GluForward& a, int64_t row, int64_t begin, int64_t end) {
  a.step == 1 ? glu_forward_row<false, S, T>(a, row, begin, end) : glu_forward_row<true, S, T>(a, row, begin, end);
}
template <class S, class T>
void glu_backward(const GluBackward& a, int64_t row, int64_t begin, int64_t end) {
  a.step == 1 ? glu_backward_row<false, S, T>(a, row, begin, end) : glu_backward_row<true, S, T>(a, row, begin, end);
}

template <class T>
constexpr GluLoops glu_loops_for() {
  using S = typename ComputeType<T>::type;
  return {glu_forward<S, T>, glu_backward<S, T>};
}
CKPT_DEFINE_LOOPS(GluLoops, glu_loops)
