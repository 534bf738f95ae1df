// x @ weight.T + bias on packed weights [panels, K, PANEL]: each weight is read once for up to a block of rows.
//
// Every output is one chain of K fused multiply-adds in order of k, however many rows there are. A row's result
// therefore does not depend on its neighbours: bitwise the same at M = 1 and at M = 512.
#pragma once
#include <algorithm>

#include "vec.h"

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

// How far ahead weights are asked for. Measured on Zen 5, one thread, 24 layers of 1024 x 1024 from DRAM, us a layer:
// 2 KB: M=1 103, M=8 125; 4 KB: 105, 115; 8 KB: 101, 98; 16 KB: 95, 86; 32 KB: 95, 95; 64 KB: 101, 103.
constexpr int PREFETCH_FLOATS = 16 * 1024 / sizeof(float);
// With two blocks of rows each fetches half of the next panel instead, else DRAM idles in the second. As above, M=16:
// 187 us -> 147, the speed of FMA; with three and more blocks there is nothing to gain. At most half of L2.
constexpr int64_t NEXT_PANEL_FLOATS = 512 * 1024 / sizeof(float);

// M rows of x times one strip of a panel; meanwhile weights at `ahead`, `step` further with every k, are fetched.
template <int M>
void strip(const float* x, int64_t ldx, const float* w, int64_t K, const float* bias, float* out, int64_t ldo, int n,
           const float* ahead, int64_t step) {
  vf sum[M][COLS];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < COLS; ++c) sum[m][c] = bias ? load(bias + c * VW) : vf{};
  for (int64_t k = 0; k < K; ++k, w += PANEL, ahead += step) {
    vf weight[COLS];
#pragma GCC unroll 4
    for (int c = 0; c < COLS; ++c) weight[c] = load(w + c * VW);
#pragma GCC unroll 4
    for (int c = 0; c < STRIP; c += 16) __builtin_prefetch(ahead + c);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const float value = x[m * ldx + k];
#pragma GCC unroll 4
      for (int c = 0; c < COLS; ++c) sum[m][c] += weight[c] * value;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int c = 0; c < COLS; ++c) {
      const int left = n - c * VW;
      if (left >= VW)
        store(out + m * ldo + c * VW, sum[m][c]);
      else if (left > 0)
        store_first(out + m * ldo + c * VW, sum[m][c], left);
    }
}

using Strip = void (*)(const float*, int64_t, const float*, int64_t, const float*, float*, int64_t, int,
                       const float*, int64_t);
constexpr Strip STRIPS[] = {nullptr,   strip<1>, strip<2>, strip<3>, strip<4>, strip<5>, strip<6>,
#if VW == 16
                            strip<7>, strip<8>, strip<9>, strip<10>, strip<11>, strip<12>, strip<13>, strip<14>,
#endif
};

// out[M, N] for the panels [begin, end).
inline void linear_panels(const float* x, int64_t M, int64_t K, const float* packed, const float* bias, float* out,
                          int64_t N, int64_t begin, int64_t end) {
  const int64_t blocks = (M + MAX_ROWS - 1) / MAX_ROWS;
  float padded_bias[PANEL];
  for (int64_t p = begin; p < end; ++p) {
    const float* w = packed + p * K * PANEL;
    const int64_t first = p * PANEL;
    const int64_t n = std::min<int64_t>(PANEL, N - first);
    const float* b = bias ? bias + first : nullptr;
    if (b && n < PANEL) {
      std::memset(padded_bias, 0, sizeof(padded_bias));
      std::memcpy(padded_bias, b, n * sizeof(float));
      b = padded_bias;
    }
    const bool shared = blocks == 2 && p + 1 < end && K * PANEL <= NEXT_PANEL_FLOATS;
    for (int64_t i = 0; i < blocks; ++i) {  // rows in blocks of nearly equal size, the panel stays in L2
      const int64_t m0 = M * i / blocks, m1 = M * (i + 1) / blocks;
      for (int c = 0; c < n; c += STRIP)
        STRIPS[m1 - m0](x + m0 * K, K, w + c, K, b ? b + c : nullptr, out + m0 * N + first + c, N, int(n - c),
                        shared ? w + (2 + i) * K * PANEL / 2 : w + c + PREFETCH_FLOATS, shared ? PANEL / 2 : PANEL);
    }
  }
}

}  // namespace treespec
