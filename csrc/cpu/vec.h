// Vectors of floats and doubles for one instruction set: included once by each isa_*.cpp, inside its namespace.
//
// CKPT_VECTOR_BYTES is the register width; CKPT_F16C says that the float16 conversions of the set may be used.
// Nothing here may call into the standard library's templates: their out-of-line copies are shared between
// the instruction sets, and the widest one could win at link time and crash an older processor.

#define CKPT_INLINE inline __attribute__((always_inline))

template <class S>
struct Raw;
template <>
struct Raw<float> {
  static constexpr int width = CKPT_VECTOR_BYTES / 4;
  typedef float type __attribute__((vector_size(width * 4)));
  typedef int32_t mask __attribute__((vector_size(width * 4)));
  static constexpr int32_t magnitude = 0x7fffffff;
  typedef uint32_t bits __attribute__((vector_size(width * 4)));
  typedef uint16_t half __attribute__((vector_size(width * 2)));
};
template <>
struct Raw<double> {
  static constexpr int width = CKPT_VECTOR_BYTES / 8;
  typedef double type __attribute__((vector_size(width * 8)));
  typedef int64_t mask __attribute__((vector_size(width * 8)));
  static constexpr int64_t magnitude = 0x7fffffffffffffff;
};

// A rough vector takes elementary functions that are good to 2^-14: what is stored in 16 bits shows no more.
template <class S, bool rough = false>
struct Vec {
  static constexpr int width = Raw<S>::width;
  using Type = typename Raw<S>::type;
  using Mask = typename Raw<S>::mask;
  Type v;

  CKPT_INLINE Vec() {}
  CKPT_INLINE Vec(Type raw) : v(raw) {}
  CKPT_INLINE explicit Vec(double scalar) : v(Type{} + S(scalar)) {}
  CKPT_INLINE explicit Vec(Vec<S, !rough> other) : v(other.v) {}

  CKPT_INLINE friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  CKPT_INLINE friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  CKPT_INLINE friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  CKPT_INLINE friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  CKPT_INLINE friend Vec operator-(Vec a) { return -a.v; }
  CKPT_INLINE Vec& operator+=(Vec b) { return v += b.v, *this; }
  CKPT_INLINE friend Mask operator>(Vec a, Vec b) { return a.v > b.v; }
  CKPT_INLINE friend Mask operator>=(Vec a, Vec b) { return a.v >= b.v; }
  CKPT_INLINE friend Mask operator<(Vec a, Vec b) { return a.v < b.v; }
  CKPT_INLINE friend Mask operator<=(Vec a, Vec b) { return a.v <= b.v; }
  CKPT_INLINE friend Vec select(Mask m, Vec yes, Vec no) { return m ? yes.v : no.v; }
  CKPT_INLINE friend Vec abs(Vec a) { return Type(Mask(a.v) & Raw<S>::magnitude); }
};

// Orders of the lanes of two vectors of `width` lanes, numbered from the first one's to the second one's.
struct Evens {
  static constexpr int lane(int i, int) { return 2 * i; }
};
struct Odds {
  static constexpr int lane(int i, int) { return 2 * i + 1; }
};
struct LowerInTurns {
  static constexpr int lane(int i, int width) { return i / 2 + i % 2 * width; }
};
struct UpperInTurns {
  static constexpr int lane(int i, int width) { return width / 2 + i / 2 + i % 2 * width; }
};
template <class Order, class V, int... i>
CKPT_INLINE V shuffle(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int width = sizeof...(i);
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Order::lane(i, width)...);
#else
  typedef decltype(a < b) Lanes;
  return __builtin_shuffle(a, b, Lanes{Order::lane(i, width)...});
#endif
}
template <class Order, class V>
CKPT_INLINE V shuffle(V a, V b) {
  return shuffle<Order>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

// How many lanes of an access are there: all, or the first few of a row's last vector.
template <class S>
struct Full {
  CKPT_INLINE Vec<S> keep(Vec<S> a) const { return a; }
};
template <class S>
struct Partial {
  int64_t count;
  CKPT_INLINE Vec<S> keep(Vec<S> a) const {
    for (int i = 0; i < Vec<S>::width; ++i)
      if (i >= count) a.v[i] = 0;
    return a;
  }
};

// Storage to vector and back. Rounding is to nearest even; NaN becomes the quiet NaN that torch writes.
template <class S>
CKPT_INLINE Vec<S> load(const S* p, Full<S>) {
  typename Raw<S>::type raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return raw;
}
// What is stored for a vector at p, by p's type.
template <class S>
CKPT_INLINE typename Raw<S>::type encode(const S*, Vec<S> a) {
  return a.v;
}

template <class S>
CKPT_INLINE int64_t count_of(Full<S>) {
  return Vec<S>::width;
}
template <class S>
CKPT_INLINE int64_t count_of(Partial<S> lanes) {
  return lanes.count;
}

// Between 16 and 32 bits a lane; compilers make several shuffles of __builtin_convertvector for these.
CKPT_INLINE Raw<float>::bits widen(const void* p) {
#if CKPT_VECTOR_BYTES == 64
  return Raw<float>::bits(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)));
#elif CKPT_VECTOR_BYTES == 32
  return Raw<float>::bits(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  Raw<float>::half raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return __builtin_convertvector(raw, Raw<float>::bits);
#endif
}
// The bits beyond the lowest 16 must be zero.
CKPT_INLINE Raw<float>::half narrow(Raw<float>::bits bits) {
#if CKPT_VECTOR_BYTES == 64
  return Raw<float>::half(_mm512_cvtepi32_epi16((__m512i)bits));
#elif CKPT_VECTOR_BYTES == 32
  __m256i raw = (__m256i)bits;
  return Raw<float>::half(_mm_packus_epi32(_mm256_castsi256_si128(raw), _mm256_extracti128_si256(raw, 1)));
#else
  return __builtin_convertvector(bits, Raw<float>::half);
#endif
}

CKPT_INLINE Vec<float> load(const bfloat16* p, Full<float>) { return Raw<float>::type(widen(p) << 16); }
CKPT_INLINE Raw<float>::half encode(const bfloat16*, Vec<float> a) {
  Raw<float>::bits bits = Raw<float>::bits(a.v);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  bits = (a.v == a.v) ? bits : Raw<float>::bits{} + 0x7fc0u;
  return narrow(bits);
}

#if defined(CKPT_F16C) && CKPT_VECTOR_BYTES == 64
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  return Raw<float>::type(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
}
CKPT_INLINE Raw<float>::half encode(const float16*, Vec<float> a) {
  return Raw<float>::half(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(CKPT_F16C)
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  return Raw<float>::type(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
CKPT_INLINE Raw<float>::half encode(const float16*, Vec<float> a) {
  return Raw<float>::half(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// A product with a power of two rebuilds the exponent, denormals included; what was Inf or NaN keeps its exponent.
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  using B = Raw<float>::bits;
  B h = widen(p);
  B sign = (h & 0x8000u) << 16;
  B magnitude = (h & 0x7fffu) << 13;
  B scaled = B(Raw<float>::type(magnitude) * 5.192296858534828e+33f);  // 2^112
  scaled = (h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
  return Raw<float>::type(sign | scaled);
}
// Adding a power of two aligned with float16's last place lets the float adder do the rounding.
CKPT_INLINE Raw<float>::half encode(const float16*, Vec<float> a) {
  using B = Raw<float>::bits;
  using F = Raw<float>::type;
  B bits = B(a.v);
  B sign = (bits >> 16) & 0x8000u;
  B magnitude = bits & 0x7fffffffu;
  B normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  B denormal = B(F(magnitude) + 0.5f) - 0x3f000000u;
  B h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x477ff000u ? B{} + 0x7c00u : h;
  h = magnitude > 0x7f800000u ? B{} + 0x7e00u : h;
  return narrow(h | sign);
}
#endif

template <class T, class S>
CKPT_INLINE void store(T* p, Vec<S> a, Full<S>) {
  auto raw = encode(p, a);
  __builtin_memcpy(p, &raw, sizeof(raw));
}

// Past the caches, to an address aligned to the vector. What is large enough to leave the caches before it is read
// need not be read into them before it is written.
template <class T, class S>
CKPT_INLINE void stream(T* p, Vec<S> a, Full<S>) {
  auto raw = encode(p, a);
#if CKPT_VECTOR_BYTES == 64
  if constexpr (sizeof(raw) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)raw);
#endif
#if CKPT_VECTOR_BYTES >= 32
  if constexpr (sizeof(raw) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)raw);
  if constexpr (sizeof(raw) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)raw);
#endif
  __builtin_memcpy(p, &raw, sizeof(raw));
}
// Other threads must see what was streamed once this one says that it is done.
CKPT_INLINE void end_streams() {
#if CKPT_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

// Two vectors' worth of elements in an order of their own, for sums over them.
template <class T, class S>
CKPT_INLINE void load_pair(const T* p, Vec<S>* first, Vec<S>* second) {
  *first = load(p, Full<S>{});
  *second = load(p + Vec<S>::width, Full<S>{});
}
CKPT_INLINE void load_pair(const bfloat16* p, Vec<float>* first, Vec<float>* second) {
  Raw<float>::bits raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  *first = Raw<float>::type(raw << 16);
  *second = Raw<float>::type(raw & 0xffff0000u);
}

// The lanes that are not there read as zero and are not written.
template <class S, class T>
CKPT_INLINE Vec<S> load(const T* p, Partial<S> lanes) {
  T padded[Vec<S>::width] = {};
  for (int64_t i = 0; i < lanes.count; ++i) padded[i] = p[i];
  return load(padded, Full<S>{});
}
template <class S, class T>
CKPT_INLINE void store(T* p, Vec<S> a, Partial<S> lanes) {
  T padded[Vec<S>::width];
  store(padded, a, Full<S>{});
  for (int64_t i = 0; i < lanes.count; ++i) p[i] = padded[i];
}

template <class S, class T>
CKPT_INLINE void stream(T* p, Vec<S> a, Partial<S> lanes) {
  store(p, a, lanes);
}

// A matrix that is written: streamed where it is large and its rows are aligned.
template <class T>
struct Written {
  T* row;
  bool streams;

  static constexpr int64_t stream_bytes = 16 << 20;
  CKPT_INLINE Written(const Rows& rows, int64_t index, int64_t count, int64_t columns)
      : row(rows.row<T>(index)),
        streams(count * columns * int64_t(sizeof(T)) >= stream_bytes && reinterpret_cast<uintptr_t>(row) % 64 == 0) {}
  template <class S, class Lanes>
  CKPT_INLINE void put(int64_t column, Vec<S> a, Lanes lanes) const {
    if (streams)
      stream(row + column, a, lanes);
    else
      store(row + column, a, lanes);
  }
};

// The value after a round trip through storage type T.
template <class S, class T>
CKPT_INLINE Vec<S> round_to(Vec<S> a) {
  T stored[Vec<S>::width];
  store(stored, a, Full<S>{});
  return load(stored, Full<S>{});
}

// Calls body(offset, lanes, slot) over n elements; slot is a compile-time 0 to 3 by which the body can pick one
// of four accumulators, so that additions do not wait for one another.
template <int k>
struct Slot {
  static constexpr int index = k;
};
template <class S, class Body>
CKPT_INLINE void sweep(int64_t n, Body body) {
  constexpr int W = Vec<S>::width;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    body(j, Full<S>{}, Slot<0>{});
    body(j + W, Full<S>{}, Slot<1>{});
    body(j + 2 * W, Full<S>{}, Slot<2>{});
    body(j + 3 * W, Full<S>{}, Slot<3>{});
  }
  for (; j + W <= n; j += W) body(j, Full<S>{}, Slot<0>{});
  if (j < n) body(j, Partial<S>{n - j}, Slot<0>{});
}

// Calls body(value, lanes, slot) on the elements at p, in an order of its own.
template <class S, class T, class Body>
CKPT_INLINE void sweep_values(const T* p, int64_t n, Body body) {
  constexpr int W = Vec<S>::width;
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    Vec<S> value[4];
    load_pair(p + j, &value[0], &value[1]);
    load_pair(p + j + 2 * W, &value[2], &value[3]);
    body(value[0], Full<S>{}, Slot<0>{});
    body(value[1], Full<S>{}, Slot<1>{});
    body(value[2], Full<S>{}, Slot<2>{});
    body(value[3], Full<S>{}, Slot<3>{});
  }
  for (; j + W <= n; j += W) body(load(p + j, Full<S>{}), Full<S>{}, Slot<0>{});
  if (j < n) body(load(p + j, Partial<S>{n - j}), Partial<S>{n - j}, Slot<0>{});
}

// The same for a body that keeps several accumulators of its own.
template <class S, class Body>
CKPT_INLINE void step(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + Vec<S>::width <= n; j += Vec<S>::width) body(j, Full<S>{});
  if (j < n) body(j, Partial<S>{n - j});
}

template <class S>
CKPT_INLINE S sum_lanes(Vec<S> a) {
  for (int half = Vec<S>::width / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}

// Into the second level: what is wanted next must not drive out of the first what is wanted now.
CKPT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

template <class S>
struct Accumulator {
  Vec<S> part[4];

  // Written out, because a constructor that the compiler makes itself is not built for the instruction set.
  CKPT_INLINE Accumulator() {
    for (int i = 0; i < 4; ++i) part[i] = Vec<S>(0.0);
  }
  CKPT_INLINE S total() const { return sum_lanes((part[0] + part[1]) + (part[2] + part[3])); }
};

// min and max that pass a NaN in x on, which the instructions do for their second operand.
#if CKPT_VECTOR_BYTES == 64
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) { return _mm512_min_ps(_mm512_set1_ps(high), x); }
#elif CKPT_VECTOR_BYTES == 32
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) { return _mm256_min_ps(_mm256_set1_ps(high), x); }
#else
CKPT_INLINE Raw<float>::type at_least(Raw<float>::type x, float low) { return x < low ? Raw<float>::type{} + low : x; }
CKPT_INLINE Raw<float>::type at_most(Raw<float>::type x, float high) {
  return x > high ? Raw<float>::type{} + high : x;
}
#endif

CKPT_INLINE Raw<float>::type nearest(Raw<float>::type x) {
#if CKPT_VECTOR_BYTES == 64
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return x + 12582912.0f - 12582912.0f;  // 1.5 * 2^23 leaves no room for a fraction
#endif
}

// m * 2^n with floor(n) for n, |n| <= 160 unless the set has an instruction for it.
CKPT_INLINE Raw<float>::type scale_by_power(Raw<float>::type m, Raw<float>::type n) {
#if CKPT_VECTOR_BYTES == 64
  return Raw<float>::type(_mm512_scalef_ps(m, n));
#else
  // In two factors, because 2^n by itself may be beyond the normal numbers.
  Raw<float>::mask k = __builtin_convertvector(n, Raw<float>::mask), half = k >> 1;
  return m * Raw<float>::type((half + 127) << 23) * Raw<float>::type((k - half + 127) << 23);
#endif
}

// e^x = 2^n (1 + f), with n the nearest integer to x / log 2 and f = expm1 of the rest by a polynomial.
struct ScaledExponential {
  Raw<float>::type n, f;
};
CKPT_INLINE ScaledExponential scaled_exponential(Raw<float>::type x) {
  Raw<float>::type n = nearest(x * 1.44269504088896341f);
  Raw<float>::type r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Raw<float>::type q = 0.001390131190419197f * r + 0.008363213390111923f;
  q = q * r + 0.04166685417294502f;
  q = q * r + 0.16666576266288757f;
  q = q * r + 0.5f;
  return {n, (q * r) * r + r};
}

CKPT_INLINE Vec<float> exp(Vec<float> x) {
  ScaledExponential e = scaled_exponential(at_most(at_least(x.v, -104.0f), 89.0f));
  return scale_by_power(1.0f + e.f, e.n);
}

// x = floor + fraction; beyond the range of 2^x any fraction will do.
struct FloorAndFraction {
  Raw<float>::type floor, fraction;

  CKPT_INLINE explicit FloorAndFraction(Raw<float>::type x) {
#if CKPT_VECTOR_BYTES == 64
    // scale_by_power takes the floor itself; the fraction of an infinity is 0.
    floor = x;
    fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    x = at_most(at_least(x, -150.0f), 129.0f);
    floor = nearest(x - 0.5f);
    fraction = x - floor;
#endif
  }
};

CKPT_INLINE Vec<float> exp2(Vec<float> x) {
  FloorAndFraction of(x.v);
  Raw<float>::type r = of.fraction;
  Raw<float>::type q = 0.0002161304550139567f * r + 0.0012467812152290561f;
  q = q * r + 0.009675454874961268f;
  q = q * r + 0.055485279192989914f;
  q = q * r + 0.2402293058151528f;
  q = q * r + 0.6931470444279537f;
  return scale_by_power(q * r + 1.0f, of.floor);
}

CKPT_INLINE Vec<float, true> exp2(Vec<float, true> x) {
  FloorAndFraction of(x.v);
  Raw<float>::type r = of.fraction;
  Raw<float>::type q = 0.013534170413511619f * r + 0.05201151784198876f;
  q = q * r + 0.2414426718400436f;
  q = q * r + 0.6930038678840404f;
  q = q * r + 1.0000025903257852f;
  return scale_by_power(q, of.floor);
}
CKPT_INLINE Vec<float, true> exp(Vec<float, true> x) { return exp2(x * Vec<float, true>(1.44269504088896341)); }

// min(x, 1e30), which keeps an infinity from meeting a zero.
template <bool rough>
CKPT_INLINE Vec<float, rough> bounded(Vec<float, rough> x) {
  return at_most(x.v, 1e30f);
}
CKPT_INLINE Vec<double> bounded(Vec<double> x) { return select(x > Vec<double>(1e30), Vec<double>(1e30), x); }

CKPT_INLINE Vec<float> expm1_nonpositive(Vec<float> x) {
  ScaledExponential e = scaled_exponential(at_least(x.v, -40.0f));
  Raw<float>::type scale = scale_by_power(Raw<float>::type{} + 1.0f, e.n);
  return scale * e.f + (scale - 1.0f);
}

// 2 atanh(s) with s = x / (2 + x).
CKPT_INLINE Vec<float> log1p_unit(Vec<float> x) {
  Raw<float>::type s = x.v / (2.0f + x.v);
  Raw<float>::type z = s * s;
  Raw<float>::type q = 0.11616778373718262f * z + 0.10852266848087311f;
  q = q * z + 0.1429625004529953f;
  q = q * z + 0.19999851286411285f;
  q = q * z + 0.3333333432674408f;
  Raw<float>::type twice = s + s;
  return twice + twice * z * q;
}

// The upper tail beyond a = |x| is bell * p(s), where p is a minimax polynomial in s = 0.33 a / (1 + 0.33 a).
CKPT_INLINE Vec<float> normal_cdf(Vec<float> x, Vec<float> bell) {
  Raw<float>::type ka = at_most(0.33f * abs(x).v, 1e30f);
  Raw<float>::type s = ka / (1.0f + ka);
  Raw<float>::type p = 0.02582946978509426f * s - 0.0840807780623436f;
  p = p * s + 0.06473537534475327f;
  p = p * s + 0.02268778719007969f;
  p = p * s + 0.06502029299736023f;
  p = p * s - 0.1541757881641388f;
  p = p * s - 0.317866712808609f;
  p = p * s + 1.0867732763290405f;
  p = p * s - 1.2089165449142456f;
  p = p * s + 0.5f;
  Raw<float>::type tail = bell.v * p;
  return select(x > Vec<float>(0.0), Vec<float>(1.0f - tail), Vec<float>(tail));
}

CKPT_INLINE Vec<float, true> normal_cdf(Vec<float, true> x, Vec<float, true> bell) {
  Raw<float>::type t = 1.0f / (0.33f * abs(x).v + 1.0f);
  Raw<float>::type p = -0.08865411325990875f * t + 0.3185031685168183f;
  p = p * t - 0.03654818829362204f;
  p = p * t + 0.18286271595263165f;
  p = p * t + 0.12334211330235831f;
  p = p * t + 0.0005198995702081829f;
  Raw<float>::type tail = bell.v * p;
  return select(x > Vec<float, true>(0.0), Vec<float, true>(1.0f - tail), Vec<float, true>(tail));
}
CKPT_INLINE Vec<float, true> expm1_nonpositive(Vec<float, true> x) {
  return Vec<float, true>(expm1_nonpositive(Vec<float>(x)));
}
CKPT_INLINE Vec<float, true> log1p_unit(Vec<float, true> x) { return Vec<float, true>(log1p_unit(Vec<float>(x))); }

// float64 is there for exactness, not speed: one lane at a time through libm.
CKPT_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::exp(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::exp2(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> expm1_nonpositive(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::expm1(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> log1p_unit(Vec<double> x) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = ::log1p(x.v[i]);
  return x;
}
CKPT_INLINE Vec<double> normal_cdf(Vec<double> x, Vec<double>) {
  for (int i = 0; i < Vec<double>::width; ++i) x.v[i] = 0.5 * ::erfc(x.v[i] * -0.70710678118654752);
  return x;
}

// What Philox is computed in: a vector of counters, each the lower half of a 64-bit lane. What is in the upper halves
// does not matter, so that a product's own lower half needs no extraction.
struct Counters {
  typedef uint64_t Type __attribute__((vector_size(CKPT_VECTOR_BYTES)));
  static constexpr int width = CKPT_VECTOR_BYTES / 8;
  static constexpr uint64_t lower = 0xffffffffu;
  Type v;

  CKPT_INLINE Counters() {}
  CKPT_INLINE Counters(Type raw) : v(raw) {}
  CKPT_INLINE explicit Counters(uint32_t scalar) : v(Type{} + scalar) {}
  CKPT_INLINE friend Counters operator^(Counters a, Counters b) { return a.v ^ b.v; }
  CKPT_INLINE friend Counters operator^(Counters a, uint32_t b) { return a.v ^ uint64_t(b); }
  CKPT_INLINE friend Counters upper_half(Counters product) { return product.v >> 32; }
  CKPT_INLINE friend Counters lower_half(Counters product) { return product; }
};
CKPT_INLINE Counters wide_product(Counters a, uint32_t b) {
#if CKPT_VECTOR_BYTES == 64
  return Counters::Type(_mm512_mul_epu32((__m512i)a.v, _mm512_set1_epi64(b)));
#elif CKPT_VECTOR_BYTES == 32
  return Counters::Type(_mm256_mul_epu32((__m256i)a.v, _mm256_set1_epi64x(b)));
#else
  return (a.v & Counters::lower) * uint64_t(b);
#endif
}

// Defines name(kind), which gives the loops that name_for<storage type>() makes. float64 is there for exactness, not
// speed, and has the generic build alone.
#if CKPT_VECTOR_BYTES == 16
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                    \
  const Loops& name(ScalarKind kind) {                                                                    \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>(), \
                                      name##_for<double>()};                                              \
    return loops[int(kind)];                                                                              \
  }
#else
#define CKPT_DEFINE_LOOPS(Loops, name)                                                                     \
  const Loops& name(ScalarKind kind) {                                                                     \
    static constexpr Loops loops[] = {name##_for<float>(), name##_for<bfloat16>(), name##_for<float16>()}; \
    return kind == ScalarKind::float64 ? generic::name(kind) : loops[int(kind)];                           \
  }
#endif
