// The widest vector of floats the target has, in the compilers' vector extensions (GCC >= 12 and Clang).
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__)
#define VW 8
#else
#define VW 4
#endif

namespace treespec {

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef float vf_at4 __attribute__((vector_size(VW * 4), aligned(4), may_alias));

#define TS_INLINE inline __attribute__((always_inline))

TS_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_at4*>(p); }
TS_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_at4*>(p) = v; }
TS_INLINE vf splat(float x) { return x - vf{}; }

TS_INLINE void store_first(float* p, vf v, int n) {
  float lanes[VW];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(float));
}

TS_INLINE float reduce_max(vf v) {
  float m = v[0];
  for (int i = 1; i < VW; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

TS_INLINE float reduce_add(vf v) {
  float s = 0;
  for (int i = 0; i < VW; ++i) s += v[i];
  return s;
}

// 2^x for x <= 0, relative error < 3e-7; exactly 0 below -126, and NaN for NaN.
TS_INLINE vf exp2_nonpositive(vf x) {
  const vf low = splat(-126.f);
  vf y = x > low ? x : low;
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  vf rounded = y + magic;
  vi exponent = reinterpret_cast<vi>(rounded) - 0x4B400000;
  vf f = y - (rounded - magic);  // in [-0.5, 0.5]
  vf p = splat(1.5403530e-4f);   // Taylor of 2^f with minimax-adjusted last terms
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  vf r = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (exponent << 23));
  return x > low ? r : (x == x ? vf{} : x);
}

// dst[i][j] = src[j][i] for a VW x VW block: log2(VW) perfect shuffles.
TS_INLINE void transpose(const float* const* src, int64_t at, float* dst, int64_t ldd) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TS_SHUFFLE 1
#endif
#endif
#ifdef TS_SHUFFLE
  vf a[VW], b[VW];
#pragma GCC unroll 16
  for (int i = 0; i < VW; ++i) a[i] = load(src[i] + at);
#pragma GCC unroll 4
  for (int stage = 1; stage < VW; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VW / 2; ++i) {
#if VW == 16
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif VW == 8
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 2], 0, 4, 1, 5);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 6, 3, 7);
#endif
    }
#pragma GCC unroll 16
    for (int i = 0; i < VW; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < VW; ++i) store(dst + i * ldd, a[i]);
#else
  for (int i = 0; i < VW; ++i)
    for (int j = 0; j < VW; ++j) dst[i * ldd + j] = src[j][at + i];
#endif
}

}  // namespace treespec
