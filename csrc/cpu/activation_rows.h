// Activations over a short run of staged values: one switch a run, not one an element. Included by each isa_*.cpp.

// How many columns are staged at a time; a multiple of every vector width, and of Philox's four lanes.
constexpr int64_t chunk_columns = 512;

template <class S>
struct Chunk {
  alignas(64) S value[chunk_columns];
};

// What is beyond n, up to a whole vector, is computed too, and ignored by the reader.
template <class S>
CKPT_INLINE int64_t whole_vectors(int64_t n) {
  return (n + Vec<S>::width - 1) / Vec<S>::width * Vec<S>::width;
}

// An activation and its derivative to the accuracy that storage type T shows.
template <class T, class S, class Function>
CKPT_INLINE Vec<S> value_of(Function function, Vec<S> z) {
  return Vec<S>(function.value(Vec<S, sizeof(T) == 2>(z.v)).v);
}
template <class T, class S, class Function>
CKPT_INLINE Vec<S> derivative_of(Function function, Vec<S> z) {
  return Vec<S>(function.derivative(Vec<S, sizeof(T) == 2>(z.v)).v);
}

template <class T, class S>
__attribute__((noinline)) void activate(int activation, S* z, int64_t n) {
  visit_activation(activation, [=](auto function) {
    step<S>(whole_vectors<S>(n),
            [=](int64_t j, auto lanes) { store(z + j, value_of<T>(function, load(z + j, lanes)), lanes); });
  });
}

template <class T, class S>
__attribute__((noinline)) void differentiate(int activation, S* z, int64_t n) {
  visit_activation(activation, [=](auto function) {
    step<S>(whole_vectors<S>(n),
            [=](int64_t j, auto lanes) { store(z + j, derivative_of<T>(function, load(z + j, lanes)), lanes); });
  });
}

// The four words of W counters as factors, in the order of their columns: word 0 to 3 of the first counter come first.
CKPT_INLINE void store_factors(const Dropout& dropout, const PhiloxState<Counters>& bits, float* factor) {
  constexpr int W = Counters::width;
  using V = Raw<float>::type;
  using B = Raw<float>::bits;
  using Pairs = Counters::Type;
  const V scale = V{} + float(dropout.scale), none{};
  const B threshold = B{} + uint32_t(dropout.threshold);
  Pairs first = (bits.word[0].v & Counters::lower) | bits.word[1].v << 32;
  Pairs last = (bits.word[2].v & Counters::lower) | bits.word[3].v << 32;
  const B early = B(shuffle<LowerInTurns>(first, last)), late = B(shuffle<UpperInTurns>(first, last));
  store(factor, Vec<float>(early >= threshold ? scale : none), Full<float>{});
  store(factor + 2 * W, Vec<float>(late >= threshold ? scale : none), Full<float>{});
}
CKPT_INLINE void store_factors(const Dropout& dropout, const PhiloxState<Counters>& bits, double* factor) {
  for (int i = 0; i < Counters::width; ++i)
    for (int k = 0; k < 4; ++k) factor[4 * i + k] = dropout.factor<double>(uint32_t(bits.word[k].v[i]));
}

// 0 or 1 / (1 - p) for n columns of a row from column j0, which is a multiple of four, and for those beyond n up to
// the end of the last counters.
template <class S>
__attribute__((noinline)) void dropout_factors(const Dropout& dropout, int64_t row, int64_t j0, int64_t n, S* factor) {
  constexpr int W = Counters::width;
  if (dropout.threshold >> 32) {
    __builtin_memset(factor, 0, n * sizeof(S));
    return;
  }
  Counters::Type lane_index;
  for (int i = 0; i < W; ++i) lane_index[i] = i;
  const Counters low_row{uint32_t(row)}, high_row{uint32_t(row >> 32)}, zero{0u};
  for (int64_t j = 0; j < n; j += 4 * W) {
    const Counters quad(lane_index + uint64_t((j0 + j) / 4));
    store_factors(dropout, philox4x32_10<Counters>({{quad, low_row, high_row, zero}}, uint64_t(*dropout.seed)),
                  factor + j);
  }
}
