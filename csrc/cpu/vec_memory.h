// Loads and stores vectors of the compute type from and to elements of any storage type.
//
// `load` and `store` take a pointer to elements and the valid lanes (Full or Partial, vec.h). Invalid lanes read as
// zero and are not written. Rounding is to nearest even, and a NaN becomes the quiet NaN that torch writes.
#pragma once

#include "target.h"
#include "vec.h"

namespace ckpt::CKPT_ISA {

// Converts 16 bits a lane to 32 and back. Compilers translate __builtin_convertvector to several shuffles where the
// wider sets have one instruction.
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
// The upper 16 bits of each lane must be zero.
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

// For each storage type: `load` of a whole vector, and `encode`, which returns the bytes that a store would write. The
// pointer argument of `encode` only selects the storage type.
template <class S>
CKPT_INLINE Vec<S> load(const S* p, Full<S>) {
  typename Raw<S>::type raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return raw;
}
template <class S>
CKPT_INLINE typename Raw<S>::type encode(const S*, Vec<S> a) {
  return a.v;
}

// A bfloat16 is the upper half of a float32.
CKPT_INLINE Vec<float> load(const bfloat16* p, Full<float>) { return Raw<float>::type(widen(p) << 16); }
// The result is in the upper half of each lane; the lower half is arbitrary.
CKPT_INLINE Raw<float>::bits rounded_to_bfloat16(Vec<float> a) {
  Raw<float>::bits bits = Raw<float>::bits(a.v);
  bits = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (a.v == a.v) ? bits : Raw<float>::bits{} + 0x7fc00000u;
}
CKPT_INLINE Raw<float>::half encode(const bfloat16*, Vec<float> a) {
#if defined(CKPT_BFLOAT16_ALONE)
  // The instruction would make zeros of denormals, and keep the payload of a NaN: the classes of this mask.
  if (!_mm512_fpclass_ps_mask(a.v, 0xa1)) return Raw<float>::half(_mm512_cvtneps_pbh(a.v));
#endif
  return narrow(rounded_to_bfloat16(a) >> 16);
}

#if CKPT_VECTOR_BYTES == 64
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  return Raw<float>::type(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)));
}
CKPT_INLINE Raw<float>::half encode(const float16*, Vec<float> a) {
  return Raw<float>::half(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#elif CKPT_VECTOR_BYTES == 32
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  return Raw<float>::type(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
CKPT_INLINE Raw<float>::half encode(const float16*, Vec<float> a) {
  return Raw<float>::half(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
#else
// A float16's exponent and fraction, read as those of a float32, are 2^112 times too small; a product corrects this for
// denormals too. Infinities and NaNs, whose exponent is all ones, get the exponent of ones of a float32 instead.
CKPT_INLINE Vec<float> load(const float16* p, Full<float>) {
  using B = Raw<float>::bits;
  B h = widen(p);
  B sign = (h & 0x8000u) << 16;
  B magnitude = (h & 0x7fffu) << 13;
  B scaled = B(Raw<float>::type(magnitude) * 5.192296858534828e+33f);  // 2^112
  scaled = (h & 0x7c00u) == 0x7c00u ? magnitude | 0x7f800000u : scaled;
  return Raw<float>::type(sign | scaled);
}
// A normal result is rounded in integers. For a denormal one, 0.5f is added: the last place of 0.5f is that of a
// float16 denormal, so that the addition itself rounds.
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

// For floats the wider sets have instructions.
#if CKPT_VECTOR_BYTES == 64
CKPT_INLINE Vec<float> load(const float* p, Partial<float> lanes) {
  return Raw<float>::type(_mm512_maskz_loadu_ps(__mmask16((1 << lanes.count) - 1), p));
}
CKPT_INLINE void store(float* p, Vec<float> a, Partial<float> lanes) {
  _mm512_mask_storeu_ps(p, __mmask16((1 << lanes.count) - 1), a.v);
}
#elif CKPT_VECTOR_BYTES == 32
CKPT_INLINE __m256i mask_of(Partial<float> lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(lanes.count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CKPT_INLINE Vec<float> load(const float* p, Partial<float> lanes) {
  return Raw<float>::type(_mm256_maskload_ps(p, mask_of(lanes)));
}
CKPT_INLINE void store(float* p, Vec<float> a, Partial<float> lanes) { _mm256_maskstore_ps(p, mask_of(lanes), a.v); }
#endif

// Loads the elements of the next two vectors in any order, for sums. For bfloat16 the even and the odd elements are two
// vectors, without a shuffle.
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

// The value after a round trip through storage type T, the pointer's element type.
template <class S, class T>
CKPT_INLINE Vec<S> round_to(const T* type, Vec<S> a) {
  auto raw = encode(type, a);
  return load(reinterpret_cast<const T*>(&raw), Full<S>{});
}
CKPT_INLINE Vec<float> round_to(const bfloat16*, Vec<float> a) {
  return Raw<float>::type(rounded_to_bfloat16(a) & 0xffff0000u);
}
template <class S, class T>
CKPT_INLINE Vec<S> round_to(Vec<S> a) {
  return round_to(static_cast<const T*>(nullptr), a);
}

// x_hat for the product with the weight: with cast_before_weight, rounded to the storage type.
template <class S, class T>
CKPT_INLINE Vec<S> rounded_if(bool cast, Vec<S> x_hat) {
  return cast && sizeof(T) < sizeof(S) ? round_to<S, T>(x_hat) : x_hat;
}

// Prefetches for reading, and for writing: a store to a line that is not in the cache waits in a short queue.
CKPT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
CKPT_INLINE void prefetch_for_write(const void* p) { __builtin_prefetch(p, 1, 3); }

}  // namespace ckpt::CKPT_ISA
