// Tree attention in float32: flash-style over chunks of 64 keys, online softmax, GQA heads and tree nodes as rows.
//
// A request's keys lie at offsets 0 .. prefix + nodes - 1 of its slot. Chunks start at multiples of 64, so that a chain
// of nodes is summed exactly as the same tokens decoded one by one. What row i sees of a chunk is one 64-bit word.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "scores.h"

namespace treespec {

constexpr int CHUNK = 64;
constexpr int ROW_BLOCK = 64;  // rows (nodes x grouped heads) of one task

struct Attention {
  const float *q, *k, *v;  // [Hq, T, Dk], [Hkv, T, Dk], [Hkv, T, Dv]
  int64_t q_head, q_token, k_head, k_token, v_head, v_token;  // strides
  float *pool_k, *pool_v;                                     // [pages, Hkv, page_size, D], token stride = D
  int64_t pool_k_page, pool_k_head, pool_v_page, pool_v_head;
  int64_t page_size, slot_pages;
  const int64_t *positions, *write_index, *node_offsets, *page_table, *prefix_lens, *tree_lens, *ancestors;
  int64_t T, R, words, heads, kv_heads, Dk, Dv, window, chunk;
  float scale;
  Scoring scoring;
  float* out;  // [T, Hq, Dv]

  // How many keys of its path a node sees at most, itself included; 0: all of them.
  int64_t reach(int64_t node) const {
    const int64_t own = chunk ? positions[node] % chunk + 1 : 0;
    return window && own ? std::min(window, own) : window + own;
  }
};

// One (request, kv head, block of nodes, range of chunks).
struct Task {
  int64_t request, head, first, last, chunk_begin, chunk_end;  // nodes [first, last) of the packed T
  bool first_part;                                             // of those of its rows: it counts the sinks
  float* partial;  // null: the only one for its rows; else [rows][padded Dv] sums, then [rows] maxima, then [rows] sums
};

// Whether none is NaN or infinite: those have all bits of their exponent set.
inline bool all_finite(const float* x, int64_t n) {
  uint32_t lost = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    lost |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return !lost;
}

// One head's key and values of a token. Values that are not all finite are stored as zeros, and their key as NaN: what
// a node does not see is multiplied by 0, and 0 times NaN is NaN; a key that is not seen never is.
inline void store_token(const float* k, int64_t Dk, const float* v, int64_t Dv, float* to_k, float* to_v) {
  if (all_finite(v, Dv)) {
    std::memcpy(to_k, k, Dk * sizeof(float));
    std::memcpy(to_v, v, Dv * sizeof(float));
  } else {
    std::fill(to_k, to_k + Dk, NAN);
    std::fill(to_v, to_v + Dv, 0.f);
  }
}

inline int64_t padded(int64_t d) { return (d + VW - 1) / VW * VW; }

struct Scratch {  // one a thread, grown and kept
  std::vector<float> q, kt, vp, s, o, m, l, c;
  std::vector<uint64_t> seen, near;
  std::vector<int64_t> low;
  std::vector<int32_t> distance;
};

inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

inline uint64_t ones(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

// The words of node `node` of a chain: it and those before it, as far back as the window reaches.
inline void chain_words(int64_t node, int64_t words, int64_t window, uint64_t* out) {
  const int64_t low = window ? node + 1 - window : 0;
  for (int64_t w = 0; w < words; ++w) out[w] = ones(node + 1 - 64 * w) & ~ones(low - 64 * w);
}

// The last `window` set bits of a row of ancestor words: ancestors fewer than `window` levels up.
inline void nearest(const int64_t* row, int64_t words, int64_t window, uint64_t* out) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(row[w]);
  for (int64_t w = 0; w < words; ++w) {
    uint64_t word = row[w];
    for (; count > window && word; --count) word &= word - 1;
    out[w] = word;
  }
}

// Bits [at, at + 64) of a row of words; at may be negative.
inline uint64_t window_of(const uint64_t* row, int64_t words, int64_t at) {
  const int64_t w = at >= 0 ? at / 64 : -((63 - at) / 64), b = at - w * 64;
  const uint64_t low = w >= 0 && w < words ? row[w] >> b : 0;
  const uint64_t high = b && w + 1 >= 0 && w + 1 < words ? row[w + 1] << (64 - b) : 0;
  return low | high;
}

// s[R][CHUNK] = q[R][Dk] . kt[Dk][CHUNK], for `vectors` vectors of keys (even).
template <int R>
void scores(const float* q, int64_t ldq, const float* kt, int64_t Dk, int vectors, float* s) {
  for (int j = 0; j < vectors; j += 2) {
    vf sum[R][2] = {};
    const float* column = kt + j * VW;
    for (int64_t d = 0; d < Dk; ++d, column += CHUNK) {
      const vf a = load(column), b = load(column + VW);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float value = q[r * ldq + d];
        sum[r][0] += a * value;
        sum[r][1] += b * value;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(s + r * CHUNK + j * VW, sum[r][0]);
      store(s + r * CHUNK + (j + 1) * VW, sum[r][1]);
    }
  }
}

// o[R][ldo] = o * c[R] + p[R][n] . v[n][ldv], for `vectors` vectors of Dv.
template <int R>
void weigh(const float* p, int n, const float* v, int64_t ldv, int64_t vectors, const float* c, float* o, int64_t ldo) {
  for (int64_t j = 0; j < vectors; j += 2) {
    const bool two = j + 1 < vectors;
    vf sum[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r][0] = load(o + r * ldo + j * VW) * c[r];
      sum[r][1] = two ? load(o + r * ldo + (j + 1) * VW) * c[r] : vf{};
    }
    const float* row = v + j * VW;
    const int64_t second = two ? VW : 0;
    for (int i = 0; i < n; ++i, row += ldv) {
      const vf a = load(row), b = load(row + second);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float value = p[r * CHUNK + i];
        sum[r][0] += a * value;
        sum[r][1] += b * value;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      store(o + r * ldo + j * VW, sum[r][0]);
      if (two) store(o + r * ldo + (j + 1) * VW, sum[r][1]);
    }
  }
}

template <int MAX, typename F>
TS_INLINE void by_rows(int64_t rows, const F& f) {  // f(first row, its count as a constant), in blocks of MAX
  int64_t r = 0;
  for (; r + MAX <= rows; r += MAX) f(r, std::integral_constant<int, MAX>());
  switch (rows - r) {
    case 7: return f(r, std::integral_constant<int, 7>());
    case 6: return f(r, std::integral_constant<int, 6>());
    case 5: return f(r, std::integral_constant<int, 5>());
    case 4: return f(r, std::integral_constant<int, 4>());
    case 3: return f(r, std::integral_constant<int, 3>());
    case 2: return f(r, std::integral_constant<int, 2>());
    case 1: return f(r, std::integral_constant<int, 1>());
  }
}

inline void fetch(const float* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(p + i);
}

// kt[Dk][CHUNK] = the n keys k[n][Dk], the last one repeated up to a multiple of 2 VW (masked later). Meanwhile the
// values, needed next, and the next chunk's keys are fetched, if they are among the `left` tokens of the page.
inline int transpose_keys(const float* k, int n, int64_t Dk, float* kt, const float* v, int64_t Dv, int64_t left) {
  const int vectors = (n + 2 * VW - 1) / (2 * VW) * 2;
  for (int j = 0; j < vectors * VW; j += VW) {
    fetch(v + j * Dv, std::min(VW, n - j) * Dv);
    fetch(k + (CHUNK + j) * Dk, std::min<int64_t>(VW, left - CHUNK - j) * Dk);
    const float* rows[VW];
    for (int i = 0; i < VW; ++i) rows[i] = k + std::min(j + i, n - 1) * Dk;
    int64_t d = 0;
    for (; d + VW <= Dk; d += VW) transpose(rows, d, kt + d * CHUNK + j, CHUNK);
    for (; d < Dk; ++d)
      for (int i = 0; i < VW; ++i) kt[d * CHUNK + j + i] = rows[i][d];
  }
  return vectors;
}

// Softmax numerators of one row of scores, in place, masked by `seen`. Updates the row's maximum m and sum l and
// gives the factor by which what was summed before shrinks.
inline float softmax_row(float* s, int vectors, uint64_t seen, float& m, float& l) {
  vi lane;
  for (int i = 0; i < VW; ++i) lane[i] = 1 << i;
  const vf lowest = splat(-INFINITY);
  vf top = lowest;
  for (int j = 0; j < vectors; ++j) {
    vf x = load(s + j * VW);
    if (~seen) {
      const vi bits = vi{} + int32_t(seen >> (j * VW) & ((uint64_t(1) << VW) - 1));
      x = (bits & lane) != 0 ? x : lowest;
      store(s + j * VW, x);
    }
    top = x > top ? x : top;
  }
  const float best = std::max(m, reduce_max(top));
  vf total = {};
  for (int j = 0; j < vectors; ++j) {
    const vf p = exp2_nonpositive(load(s + j * VW) - best);
    store(s + j * VW, p);
    total += p;
  }
  const float shrink = best == m ? 1.f : std::exp2(m - best);
  m = best;
  l = l * shrink + reduce_add(total);
  return shrink;
}

constexpr int DISTANCES = CHUNK + 2 * VW;  // of a node: a run of keys is filled up to whole vectors

// Distances of the keys [begin, end) of its slot from a node, along its path; 0 for keys that are not on it.
inline void distances(const Attention& a, int64_t request, int64_t node, int64_t begin, int64_t end, int32_t* out) {
  const int64_t prefix = a.prefix_lens[request], tree = a.tree_lens[request];
  for (int64_t at = begin; at < std::min(end, prefix); ++at) *out++ = int32_t(a.positions[node] - at);
  const int64_t first = std::max(begin, prefix) - prefix, last = end - prefix;
  if (!a.words) {
    const int64_t own = tree - a.node_offsets[request + 1] + node;
    for (int64_t at = first; at < last; ++at) *out++ = int32_t(std::max<int64_t>(0, own - at));
    return;
  }
  const int64_t* row = a.ancestors + node * a.words;
  int64_t above = 0;  // ancestors from this key on
  for (int64_t w = 0; w < a.words; ++w) above += __builtin_popcountll(row[w] & ~ones(first - 64 * w));
  for (int64_t at = first; at < last; ++at) {
    const bool there = row[at / 64] >> (at % 64) & 1;
    above -= there;
    *out++ = there ? int32_t(above) : 0;
  }
}

inline void run_task(const Attention& a, const Task& task) {
  Scratch& t = scratch();
  const int64_t group = a.heads / a.kv_heads, Dk = a.Dk, Dv = a.Dv, ldo = padded(Dv);
  const int64_t nodes = task.last - task.first, rows = nodes * group;
  const int64_t prefix = a.prefix_lens[task.request], length = prefix + a.tree_lens[task.request];
  const int64_t* table = a.page_table + task.request * a.slot_pages;
  const bool chain = a.words == 0;
  const int64_t tree = a.tree_lens[task.request], words = chain ? (tree + 63) / 64 : a.words;

  t.q.resize(rows * Dk), t.kt.resize(Dk * CHUNK), t.s.resize(rows * CHUNK);
  t.o.assign(rows * ldo, 0.f), t.m.assign(rows, -1e30f), t.l.assign(rows, 0.f), t.c.resize(rows);
  t.distance.resize(nodes * DISTANCES);
  t.seen.resize(nodes), t.low.resize(nodes), t.near.resize(nodes * words);

  const bool changes = a.scoring.changes(), by_distance = a.scoring.by_distance();
  const float scale = changes ? a.scale : a.scale * LOG2E;
  if (a.scoring.sinks && task.first_part) {
    for (int64_t r = 0; r < rows; ++r) {
      const float sink = a.scoring.sinks[task.head * group + r % group] * LOG2E;
      t.m[r] = std::max(t.m[r], sink), t.l[r] = std::exp2(sink - t.m[r]);
    }
  }
  for (int64_t i = 0; i < nodes; ++i) {
    const int64_t node = task.first + i;
    for (int64_t g = 0; g < group; ++g) {
      const float* from = a.q + (task.head * group + g) * a.q_head + node * a.q_token;
      float* to = t.q.data() + (i * group + g) * Dk;
      for (int64_t d = 0; d < Dk; ++d) to[d] = from[d] * scale;
    }
    const int64_t* row = a.ancestors + node * words;
    uint64_t* near = t.near.data() + i * words;
    const int64_t reach = a.reach(node);
    t.low[i] = reach ? std::max<int64_t>(0, a.positions[node] - reach + 1) : 0;
    if (chain)
      chain_words(tree - a.node_offsets[task.request + 1] + node, words, reach, near);
    else if (reach)
      nearest(row, words, reach, near);
    else
      std::memcpy(near, row, words * sizeof(int64_t));
  }

  for (int64_t chunk = task.chunk_begin; chunk < task.chunk_end; ++chunk) {
    const int64_t begin = chunk * CHUNK, end = std::min(begin + CHUNK, length);
    const uint64_t all = ones(end - begin);
    uint64_t any = 0;
    for (int64_t i = 0; i < nodes; ++i) {
      const uint64_t committed = ones(prefix - begin) & ~ones(t.low[i] - begin);
      uint64_t seen = committed;
      if (end > prefix) seen |= window_of(t.near.data() + i * words, words, begin - prefix);
      t.seen[i] = seen & all;
      any |= t.seen[i];
    }
    if (!any) continue;
    for (int64_t i = 0; by_distance && i < nodes; ++i)
      distances(a, task.request, task.first + i, begin, end, t.distance.data() + i * DISTANCES);

    // a chunk may cross pages: its keys and values are runs of tokens within one page
    for (int64_t at = begin; at < end;) {
      const int64_t page = table[at / a.page_size], offset = at % a.page_size;
      const int n = int(std::min(end - at, a.page_size - offset));
      const int shift = int(at - begin);
      const float* k = a.pool_k + page * a.pool_k_page + task.head * a.pool_k_head + offset * Dk;
      const float* v = a.pool_v + page * a.pool_v_page + task.head * a.pool_v_head + offset * Dv;
      at += n;
      if (!(any >> shift & ones(n))) continue;
      int64_t ldv = Dv;
      if (ldo != Dv) {  // whole vectors of the last token would pass its end
        t.vp.assign(n * ldo, 0.f);
        for (int i = 0; i < n; ++i) std::memcpy(t.vp.data() + i * ldo, v + i * Dv, Dv * sizeof(float));
        v = t.vp.data(), ldv = ldo;
      }
      const int vectors = transpose_keys(k, n, Dk, t.kt.data(), v, ldv, n + std::min(length - at, a.page_size - offset - n));
      by_rows<8>(rows, [&](int64_t r, auto count) {
        constexpr int R = decltype(count)::value;
        scores<R>(t.q.data() + r * Dk, Dk, t.kt.data(), Dk, vectors, t.s.data() + r * CHUNK);
        for (int i = 0; changes && i < R; ++i)
          change_scores(a.scoring, task.first + (r + i) / group, task.head * group + (r + i) % group,
                        t.distance.data() + (r + i) / group * DISTANCES + shift, vectors,
                        t.s.data() + (r + i) * CHUNK);
        for (int i = 0; i < R; ++i) {
          const uint64_t seen = t.seen[(r + i) / group] >> shift & ones(n);
          t.c[r + i] = softmax_row(t.s.data() + (r + i) * CHUNK, vectors, seen, t.m[r + i], t.l[r + i]);
        }
        weigh<R>(t.s.data() + r * CHUNK, n, v, ldv, ldo / VW, t.c.data() + r, t.o.data() + r * ldo, ldo);
      });
    }
  }

  if (task.partial) {
    std::memcpy(task.partial, t.o.data(), rows * ldo * sizeof(float));
    std::memcpy(task.partial + rows * ldo, t.m.data(), rows * sizeof(float));
    std::memcpy(task.partial + rows * (ldo + 1), t.l.data(), rows * sizeof(float));
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t node = task.first + r / group, head = task.head * group + r % group;
    float* to = a.out + (node * a.heads + head) * Dv;
    const float* from = t.o.data() + r * ldo;
    const float inverse = 1.f / t.l[r];
    for (int64_t d = 0; d < Dv; ++d) to[d] = from[d] * inverse;
  }
}

// Merges `splits` partial results of the same rows by their log-sum-exp.
inline void merge(const Attention& a, const Task* tasks, int64_t splits) {
  const int64_t group = a.heads / a.kv_heads, ldo = padded(a.Dv);
  const int64_t rows = (tasks[0].last - tasks[0].first) * group;
  for (int64_t r = 0; r < rows; ++r) {
    float best = -INFINITY, sum = 0;
    for (int64_t s = 0; s < splits; ++s) best = std::max(best, tasks[s].partial[rows * ldo + r]);
    const int64_t node = tasks[0].first + r / group, head = tasks[0].head * group + r % group;
    float* to = a.out + (node * a.heads + head) * a.Dv;
    for (int64_t s = 0; s < splits; ++s)
      sum += tasks[s].partial[rows * (ldo + 1) + r] * std::exp2(tasks[s].partial[rows * ldo + r] - best);
    for (int64_t s = 0; s < splits; ++s) {
      const float share = std::exp2(tasks[s].partial[rows * ldo + r] - best) / sum;
      const float* from = tasks[s].partial + r * ldo;
      for (int64_t d = 0; d < a.Dv; ++d) to[d] = (s ? to[d] : 0.f) + from[d] * share;
    }
  }
}

}  // namespace treespec
