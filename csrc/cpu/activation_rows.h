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

// 0 or 1 / (1 - p) for n columns of a row from column j0, which is a multiple of four.
template <class S>
__attribute__((noinline)) void dropout_factors(const RowNorm& a, int64_t row, int64_t j0, int64_t n, S* factor) {
  constexpr int W = Bits::width;
  Bits::Type lane_index;
  for (int i = 0; i < W; ++i) lane_index[i] = i;
  for (int64_t j = 0; j < n; j += 4 * W) {
    Bits quad(lane_index + uint32_t((j0 + j) / 4));
    PhiloxState<Bits> bits =
        philox4x32_10<Bits>({{quad, Bits(uint32_t(row)), Bits(uint32_t(row >> 32)), Bits(0)}}, uint64_t(*a.seed));
    for (int i = 0; i < W && j + 4 * i < n; ++i)
      for (int lane = 0; lane < 4; ++lane) factor[j + 4 * i + lane] = a.dropout.factor<S>(bits.word[lane].v[i]);
  }
}
