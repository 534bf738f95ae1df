// The forms in which weights are stored, and how a strip of each is widened to float32, exactly.
//
// A panel is a row of blocks. A block holds K_BLOCK values of k for 32 outputs in BYTES bytes; `Reader` walks through the
// blocks of a panel for one strip of outputs and gives, for one k after the other, COLS vectors of weights. Layouts are
// those of ir/narrow.py.
//
// ROWS: of x, multiplied at once. DIRECT: up to so many a panel is widened in registers, for every block of rows anew;
// above, once, to memory. Measured with 1536 x 1536: bfloat16, 16 and 28 rows, 700 us and 1050 against 1100 and 1350;
// four bits at 28 rows 1700 against 1200. TOGETHER: up to so many rows both strips of a panel are summed at once. READING:
// the time to read a weight, in eighths of reading a float32 one.
#pragma once
#include <algorithm>

#include "vec.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace treespec {

constexpr int PANEL = 32;
#if VW == 16  // 32 registers of 16: 2 weights + 14 x 2 sums
constexpr int COLS = 2, MAX_ROWS = 14;
#elif VW == 8  // 16 registers of 8: 2 weights + 6 x 2 sums
constexpr int COLS = 2, MAX_ROWS = 6;
#else  // 32 registers of 4: 4 weights + 6 x 4 sums
constexpr int COLS = 4, MAX_ROWS = 6;
#endif
constexpr int STRIP = COLS * VW;  // outputs of a panel summed at once
constexpr int STRIPS_A_PANEL = PANEL / STRIP;

// A form's TOGETHER. Vectors of 16 have one strip a panel, and those of 4 have chains enough in one. Measured on Zen 3, one
// thread, 60 MB (float32 120), M=1, ms: float32 17.3 -> 12.1, bfloat16 7.9 -> 5.3, float16 7.7 -> 6.1, q8_0 9.5 -> 6.1,
// q4_1 10.4 -> 9.5, q4_0 12.5 -> 11.1; with five and six bits registers do not suffice, and nothing is gained.
constexpr int most_together(int rows) { return VW == 8 ? rows : 0; }

typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint32_t vu_at4 __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t vh_at2 __attribute__((vector_size(VW * 2), aligned(2), may_alias));
typedef int8_t vb_at1 __attribute__((vector_size(VW), aligned(1), may_alias));

TS_INLINE vu load_words(const char* p) { return *reinterpret_cast<const vu_at4*>(p); }

// VW numbers of float16, finite ones.
TS_INLINE vf load_half(const char* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON) && VW == 4
  return reinterpret_cast<vf>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)))));
#else
  // exponent and mantissa in float32's places are 2^112 times too small; below float16's normal numbers too
  const vu bits = __builtin_convertvector(*reinterpret_cast<const vh_at2*>(p), vu);
  const vf scaled = reinterpret_cast<vf>((bits & 0x7fff) << 13) * 0x1p112f;
  return reinterpret_cast<vf>(reinterpret_cast<vu>(scaled) | (bits & 0x8000) << 16);
#endif
}

// VW integers of eight bits. GCC 12 converts vectors of bytes one by one, hence the instructions by name.
TS_INLINE vf load_bytes(const char* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__) && defined(__F16C__)
  return reinterpret_cast<vf>(
      _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_at1*>(p), vf);
#endif
}

// Runs of K_BLOCK values of k that share a header.
template <class Form>
constexpr int RUNS = 1;

// Where vector c of strip s begins within a panel: strips are runs of outputs, unless a form says otherwise.
constexpr int in_order(int s, int c) { return s * STRIP + c * VW; }

struct Float32 {
  static constexpr int K_BLOCK = 1, BYTES = PANEL * 4, ROWS = MAX_ROWS, DIRECT = ROWS;
  static constexpr int TOGETHER = most_together(3), READING = 8;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char* p;
    TS_INLINE Reader(const char* panel, int s) : p(panel + 4 * column(s, 0)) {}
    TS_INLINE void begin() {}
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) w[c] = load(reinterpret_cast<const float*>(p) + c * VW);
      p += BYTES;
    }
  };
};

// A word of 32 bits holds output j below output j + 16: one shift, one mask.
struct BFloat16 {
  static constexpr int K_BLOCK = 1, BYTES = PANEL * 2, ROWS = MAX_ROWS, DIRECT = 4 * ROWS;
  static constexpr int TOGETHER = most_together(3), READING = 4;
  static constexpr int column(int s, int c) { return c / (COLS / 2) * 16 + (s * (COLS / 2) + c % (COLS / 2)) * VW; }
  struct Reader {
    const char* p;
    TS_INLINE Reader(const char* panel, int s) : p(panel + 4 * column(s, 0)) {}
    TS_INLINE void begin() {}
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 2
      for (int c = 0; c < COLS / 2; ++c) {
        const vu words = load_words(p + c * VW * 4);
        w[c] = reinterpret_cast<vf>(words << 16);
        w[c + COLS / 2] = reinterpret_cast<vf>(words & 0xffff0000u);
      }
      p += BYTES;
    }
  };
};

struct Float16 {
  static constexpr int K_BLOCK = 1, BYTES = PANEL * 2, ROWS = std::min(8, MAX_ROWS), DIRECT = 2 * ROWS;
  static constexpr int TOGETHER = most_together(3), READING = 5;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char* p;
    TS_INLINE Reader(const char* panel, int s) : p(panel + 2 * column(s, 0)) {}
    TS_INLINE void begin() {}
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) w[c] = load_half(p + c * VW * 2);
      p += BYTES;
    }
  };
};

// The four low bits of every word, as a number less `zero`.
template <int zero>
TS_INLINE vf low_nibble(vu words) {
#if VW == 16
  const vf table = {0 - zero, 1 - zero, 2 - zero,  3 - zero,  4 - zero,  5 - zero,  6 - zero,  7 - zero,
                    8 - zero, 9 - zero, 10 - zero, 11 - zero, 12 - zero, 13 - zero, 14 - zero, 15 - zero};
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(words), reinterpret_cast<__m512>(table)));
#else
  return __builtin_convertvector(reinterpret_cast<vi>(words & 15) - zero, vf);
#endif
}

// VW steps, of outputs `at` and on: in float16, or `wide`, in float32.
template <bool wide>
TS_INLINE vf load_steps(const char* p, int at) {
  return wide ? load(reinterpret_cast<const float*>(p) + at) : load_half(p + 2 * at);
}

// The next four bits of every word below the next bit of another one, as a number less `zero`; both words move on.
template <int BITS, int zero>
TS_INLINE vf next_level(vu& low, vu& high) {
  vf level;
  if constexpr (BITS == 4) {
    level = low_nibble<zero>(low);
  } else {
    level = __builtin_convertvector(reinterpret_cast<vi>((low & 15) | (high & 1) << 4) - zero, vf);
    high >>= 1;
  }
  low >>= 4;
  return level;
}

// 32 values of k in four or five bits each: a step and, with `minimum`, what is added to it, for every output; the fifth
// bits, a word an output; then, for every eighth k, a word an output. A float16 step times 0 .. 31 is exact in float32, and
// without a minimum the product is all there is, so that every value is rounded once.
template <bool minimum, int BITS = 4, bool wide = false>
struct Nibbles {
  static constexpr int ONE = wide ? 128 : 64, SCALES = minimum ? 2 * ONE : ONE, HIGH = BITS == 5 ? 128 : 0;
  static constexpr int K_BLOCK = 32, BYTES = SCALES + HIGH + 512, ROWS = MAX_ROWS, DIRECT = ROWS;
  static constexpr int TOGETHER = most_together(BITS == 5 ? 0 : 1), READING = BITS == 5 ? 7 : 6;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char* p;
    int first;
    vf step[COLS], least[COLS];
    vu words[COLS], high[COLS];
    TS_INLINE Reader(const char* panel, int s) : p(panel), first(column(s, 0)) {}
    TS_INLINE void begin() {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        step[c] = load_steps<wide>(p, first + c * VW);
        if (minimum) least[c] = load_steps<wide>(p + ONE, first + c * VW);
        if (BITS == 5) high[c] = load_words(p + SCALES + 4 * (first + c * VW));
      }
      p += SCALES + HIGH;
    }
    TS_INLINE void eight() {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) words[c] = load_words(p + 4 * (first + c * VW));
      p += PANEL * 4;
    }
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        const vf level = next_level<BITS, minimum ? 0 : 1 << (BITS - 1)>(words[c], high[c]);
        w[c] = minimum ? level * step[c] + least[c] : level * step[c];
      }
    }
  };
};

template <bool wide>
struct Bytes {  // 32 values of k in eight bits each, after a step for every output
  static constexpr int SCALES = wide ? 128 : 64;
  static constexpr int K_BLOCK = 32, BYTES = SCALES + 1024, ROWS = MAX_ROWS, DIRECT = 2 * ROWS;
  static constexpr int TOGETHER = most_together(2), READING = 6;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char* p;
    int first;
    vf step[COLS];
    TS_INLINE Reader(const char* panel, int s) : p(panel), first(column(s, 0)) {}
    TS_INLINE void begin() {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) step[c] = load_steps<wide>(p, first + c * VW);
      p += SCALES;
    }
    TS_INLINE void eight() {}
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) w[c] = load_bytes(p + first + c * VW) * step[c];
      p += PANEL;
    }
  };
};

// GGUF's Q4_K and Q5_K: 256 values of k share float16 d and dmin and three words an output, of eight scales and eight
// minima in six bits each; then, for every 32 k, their fifth bits, a word an output, and words of eight k. Both products are
// exact in float32, so that every value is rounded once.
template <int BITS>
struct BitsK {
  static constexpr int HIGH = BITS == 5 ? 128 : 0, HEADER = 512;
  static constexpr int K_BLOCK = 32, BYTES = HEADER / 8 + HIGH + 512, ROWS = MAX_ROWS, DIRECT = ROWS;
  static constexpr int TOGETHER = most_together(BITS == 5 ? 0 : 1), READING = BITS == 5 ? 7 : 6;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char *p, *header;
    int first, run = 0;
    vf step[COLS], least[COLS];
    vu words[COLS], high[COLS];
    TS_INLINE Reader(const char* panel, int s) : p(panel), header(panel), first(column(s, 0)) {}
    TS_INLINE static vf number(vu six_bits) { return __builtin_convertvector(reinterpret_cast<vi>(six_bits), vf); }
    TS_INLINE void begin() {
      if (run == 0) header = p, p += HEADER;
      const int shift = 8 * (run % 4);
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        const int at = first + c * VW;
        vu scale = load_words(header + 128 + 4 * at) >> shift, minimum = load_words(header + 256 + 4 * at) >> shift;
        if (run >= 4) {  // four bits lie in the third word, two on top of the first four scales and minima
          const vu low = load_words(header + 384 + 4 * at) >> shift;
          scale = (low & 15) | (scale >> 2 & 48), minimum = (low >> 4 & 15) | (minimum >> 2 & 48);
        }
        step[c] = load_half(header + 2 * at) * number(scale & 63);
        least[c] = load_half(header + 64 + 2 * at) * number(minimum & 63);
        if (BITS == 5) high[c] = load_words(p + 4 * at);
      }
      p += HIGH;
      run = (run + 1) % 8;
    }
    TS_INLINE void eight() {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) words[c] = load_words(p + 4 * (first + c * VW));
      p += PANEL * 4;
    }
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) w[c] = next_level<BITS, 0>(words[c], high[c]) * step[c] - least[c];
    }
  };
};
template <int BITS>
inline constexpr int RUNS<BitsK<BITS>> = 8;

// GGUF's Q6_K: 256 values of k share a float16 d and sixteen scales in eight bits; then, for every 32 k, four words of low
// nibbles of eight k and two words of the high bits of 16 k.
struct SixBitsK {
  static constexpr int K_BLOCK = 32, BYTES = 840, HEADER = 576, ROWS = MAX_ROWS, DIRECT = ROWS;
  static constexpr int TOGETHER = 0, READING = 7;
  static constexpr int column(int s, int c) { return in_order(s, c); }
  struct Reader {
    const char *p, *header;
    int first, run = 0, eighth = 0;
    vf step[COLS];
    vu low[COLS], high[COLS];
    TS_INLINE Reader(const char* panel, int s) : p(panel), header(panel), first(column(s, 0)) {}
    TS_INLINE void begin() {
      if (run == 0) header = p, p += HEADER;
    }
    TS_INLINE void eight() {
      const int half = eighth / 2;
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        const int at = first + c * VW;
        if (eighth % 2 == 0) {
          step[c] = load_half(header + 2 * at) * load_bytes(header + 64 + (2 * run + half) * PANEL + at);
          high[c] = load_words(p + 512 + 4 * (half * PANEL + at));
        }
        low[c] = load_words(p + 4 * (eighth * PANEL + at));
      }
      if (++eighth == 4) p += 768, eighth = 0, run = (run + 1) % 8;
    }
    TS_INLINE void next(vf* w) {
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) {
        const vu level = (low[c] & 15) | (high[c] & 3) << 4;
        w[c] = __builtin_convertvector(reinterpret_cast<vi>(level) - 32, vf) * step[c];
        low[c] >>= 4, high[c] >>= 2;
      }
    }
  };
};
template <>
inline constexpr int RUNS<SixBitsK> = 8;

}  // namespace treespec
