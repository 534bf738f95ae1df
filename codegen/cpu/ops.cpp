// The treespec_cpu ops: checks, threads, and the kernels of the headers. Schemas are declared in Python.
#include <atomic>
#include <cstdlib>
#include <unordered_set>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "attention.h"
#include "checksum.h"
#include "encode.h"
#include "products.h"

namespace treespec {
namespace {

using at::Tensor;

// Whether `work`, in units of about 0.05 ns, is shared between threads. Measured on two cores of Zen 5: a second thread
// that spins joins in 1 us and pays from 5 us of work (256 x 256: 3.7 us against 4.0); one that sleeps joins in 40 us
// and pays from 100 us (2048 x 1024: 86 us against 107, 1024 x 1024: 71 against 57).
// Between a loop's other work the spinning one joins later than that: a 0.5M-parameter draft whose largest products were
// shared took 110 us a call instead of 65, and from 15 us of work on an 11.5M-parameter target loses nothing.
bool worth_threads(int64_t work) {
  static const bool sleeps = [] {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy && (policy[0] == 'p' || policy[0] == 'P');
  }();
  return work >= (sleeps ? 2'000'000 : 300'000) && at::get_num_threads() > 1 && !at::in_parallel_region();
}

const Product& product_of(c10::string_view form) {
  const Product* found = find_product(form.empty() ? std::string_view("float32") : std::string_view(form.data(), form.size()));
  TORCH_CHECK(found, "packed_linear knows no form ", form);
  return *found;
}

at::ScalarType stored_as(c10::string_view form) {
  if (form.empty() || form == "float32") return at::kFloat;
  return form == "bfloat16" ? at::kBFloat16 : form == "float16" ? at::kHalf : at::kByte;
}

void run_linear(const Product& product, const Tensor& x, const Tensor& packed, const float* bias, Tensor& out, int64_t N,
                int64_t K) {
  const int64_t M = K ? x.numel() / K : out.numel() / N, panels = packed.size(0);
  const float* xs = x.const_data_ptr<float>();
  const char* ws = static_cast<const char*>(packed.const_data_ptr());
  float* to = out.mutable_data_ptr<float>();
  const auto run = [&](int64_t begin, int64_t end) { product.panels(xs, M, K, ws, bias, to, N, begin, end); };
  // 1M units take about 50 us on one core (Zen 5): reading a float32 weight costs as much as using it for 8 rows
  if (worth_threads(panels * PANEL * K * (product.reading + M) / 8))
    at::parallel_for(0, panels, 1, run);
  else
    run(0, panels);
}

// Its k, after a look at whether it is a packed weight of this form with `rows` outputs.
int64_t columns_of(const Tensor& packed, int64_t rows, c10::string_view form) {
  TORCH_CHECK(packed.dim() == 3 && packed.is_contiguous(), "packed must come from pack_weight");
  const Product& product = product_of(form);
  const int64_t bytes = packed.size(2) * packed.element_size();
  TORCH_CHECK(packed.scalar_type() == stored_as(form) && bytes == product.bytes * product.runs,
              "packed must come from pack_weight(weight, \"", form, "\"), got ", packed.scalar_type(), " ",
              packed.sizes());
  const int64_t K = packed.size(1) * product.k_block * product.runs;
  TORCH_CHECK(rows > (packed.size(0) - 1) * PANEL && rows <= packed.size(0) * PANEL, "out_features ", rows,
              " does not fit ", packed.size(0), " panels of ", PANEL);
  return K;
}

Tensor packed_linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N,
                     c10::string_view form) {
  const int64_t K = columns_of(packed, N, form);
  TORCH_CHECK(input.scalar_type() == at::kFloat, "packed_linear takes float32");
  TORCH_CHECK(input.dim() > 0 && input.size(-1) == K, "x has ", input.size(-1), " features, the packed weight ", K);
  const Tensor x = input.is_contiguous() ? input : input.contiguous();
  Tensor held;
  const float* b = nullptr;
  if (bias && bias->defined()) {
    TORCH_CHECK(bias->numel() == N && bias->scalar_type() == at::kFloat, "bias must be float32 [", N, "]");
    held = bias->is_contiguous() ? *bias : bias->contiguous();
    b = held.const_data_ptr<float>();
  }
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  Tensor out = at::detail::empty_cpu(shape, at::kFloat);
  run_linear(product_of(form), x, packed, b, out, N, K);
  return out;
}

Tensor int64_input(const Tensor& t, int64_t numel, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.numel() == numel, name, " must be int64 with ", numel, " elements, got ",
              t.scalar_type(), " with ", t.numel());
  return t.is_contiguous() ? t : t.contiguous();
}

Tensor packed_embedding(const Tensor& ids_in, const Tensor& packed, int64_t N, c10::string_view form) {
  const int64_t K = columns_of(packed, N, form);
  const Tensor ids = int64_input(ids_in, ids_in.numel(), "ids");
  at::DimVector shape(ids_in.sizes().begin(), ids_in.sizes().end());
  shape.push_back(K);
  Tensor out = at::detail::empty_cpu(shape, at::kFloat);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  float* to = out.mutable_data_ptr<float>();
  const char* from = static_cast<const char*>(packed.const_data_ptr());
  const Product& product = product_of(form);
  const int64_t bytes = K / product.k_block * product.bytes;
  for (int64_t i = 0; i < ids.numel(); ++i) {
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < N, "got id ", id[i], ", expected 0 to ", N - 1);
    product.column(from + id[i] / PANEL * bytes, K, int(id[i] % PANEL), to + i * K);
  }
  return out;
}

// The forms by number, as ir/linear.py has them.
constexpr c10::string_view NUMBERED_FORMS[] = {"",     "float32", "bfloat16", "float16", "q4_0", "q4_1", "q8_0",
                                                "q4_k", "q6_k",    "i4",       "i8",      "q5_0", "q5_1", "q5_k"};

c10::string_view numbered_form(int64_t form) {
  TORCH_CHECK(form >= 0 && form < int64_t(std::size(NUMBERED_FORMS)), "packed_linear knows no form number ", form);
  return NUMBERED_FORMS[form];
}

Tensor packed_linear_numbered(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t N,
                              int64_t form) {
  return packed_linear(input, packed, bias, N, numbered_form(form));
}

Tensor packed_embedding_numbered(const Tensor& ids, const Tensor& packed, int64_t N, int64_t form) {
  return packed_embedding(ids, packed, N, numbered_form(form));
}

Tensor unit_last_stride(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

Tensor floats_a_head(const std::optional<Tensor>& t, int64_t heads, const char* name) {
  if (!t || !t->defined()) return Tensor();
  TORCH_CHECK(t->numel() == heads, name, " must be [", heads, "], got ", t->sizes());
  return t->to(at::kFloat).contiguous();
}

Tensor tree_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& pool_k,
                      const Tensor& pool_v, const Tensor& positions_in, const Tensor& write_index_in,
                      const Tensor& node_offsets_in, const Tensor& page_table_in, const Tensor& prefix_lens_in,
                      const Tensor& tree_lens_in, const Tensor& ancestors_in, double scale, int64_t window,
                      int64_t chunk, double softcap, const std::optional<Tensor>& slopes,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks,
                      const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, c10::string_view,
                      int64_t rotary, c10::string_view pattern, c10::string_view activation) {
  TORCH_CHECK(!cos && !sin && !rotary && pattern.empty() && activation == "softmax",
              "this tree_attention takes rotated q and k, no pattern and a softmax");
  for (const Tensor* t : {&q_in, &k_in, &v_in, &pool_k, &pool_v})
    TORCH_CHECK(t->dim() == 4 && t->scalar_type() == at::kFloat, "tree_attention takes float32 tensors of 4 dimensions");
  const int64_t heads = q_in.size(1), T = q_in.size(2), Dk = q_in.size(3);
  const int64_t kv_heads = k_in.size(1), Dv = v_in.size(3), page_size = pool_k.size(2), pages = pool_k.size(0);
  TORCH_CHECK(q_in.size(0) == 1 && heads % kv_heads == 0, "q must be [1, heads, T, D] with heads a multiple of ", kv_heads);
  TORCH_CHECK(k_in.size(2) == T && v_in.size(2) == T && k_in.size(3) == Dk && v_in.size(1) == kv_heads,
              "k and v must be [1, kv heads, ", T, ", D], got ", k_in.sizes(), " and ", v_in.sizes());
  TORCH_CHECK(pool_k.size(1) == kv_heads && pool_k.size(3) == Dk && pool_v.size(1) == kv_heads && pool_v.size(3) == Dv &&
                  pool_v.size(0) == pages && pool_v.size(2) == page_size,
              "pools must be [pages, ", kv_heads, ", page size, D], got ", pool_k.sizes(), " and ", pool_v.sizes());
  TORCH_CHECK(pool_k.stride(3) == 1 && pool_k.stride(2) == Dk && pool_v.stride(3) == 1 && pool_v.stride(2) == Dv,
              "the tokens of a page must be contiguous");
  const int64_t R = prefix_lens_in.numel();
  TORCH_CHECK(page_table_in.dim() == 2 && ancestors_in.dim() == 2, "page_table and ancestors have 2 dimensions");
  const int64_t slot_pages = page_table_in.size(1), words = ancestors_in.size(1);  // no words: chains
  TORCH_CHECK(slot_pages > 0 || R == 1, "got no pages for ", R, " requests, expected one request");

  const Tensor q = unit_last_stride(q_in), k = unit_last_stride(k_in), v = unit_last_stride(v_in);
  const Tensor positions = int64_input(positions_in, T, "positions");
  const Tensor write_index = int64_input(write_index_in, T, "write_index");
  const Tensor node_offsets = int64_input(node_offsets_in, R + 1, "node_offsets");
  const Tensor page_table = int64_input(page_table_in, R * slot_pages, "page_table");
  const Tensor prefix_lens = int64_input(prefix_lens_in, R, "prefix_lens");
  const Tensor tree_lens = int64_input(tree_lens_in, R, "tree_lens");
  const Tensor ancestors = int64_input(ancestors_in, T * words, "ancestors");
  const Tensor slope = floats_a_head(slopes, heads, "slopes"), sink = floats_a_head(sinks, heads, "sinks");
  Tensor own;
  if (bias && bias->defined()) {
    const int64_t dim = bias->dim();
    const bool fits = dim == 2 || (dim == 3 && bias->size(0) == T);
    TORCH_CHECK(fits && bias->size(dim - 2) == heads && bias->size(dim - 1) > 0, "bias must be [", heads,
                ", distances] or [", T, ", ", heads, ", distances], got ", bias->sizes());
    own = bias->to(at::kFloat).contiguous();
  }
  const auto floats = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const int64_t far = own.defined() ? own.size(-1) : 0;
  const Scoring scoring{float(softcap), floats(slope), floats(own), own.defined() && own.dim() == 3 ? heads * far : 0, far, floats(sink)};
  Tensor out = at::detail::empty_cpu({1, T, heads, Dv}, at::kFloat);

  Attention a{q.const_data_ptr<float>(), k.const_data_ptr<float>(), v.const_data_ptr<float>(),
              q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
              pool_k.mutable_data_ptr<float>(), pool_v.mutable_data_ptr<float>(),
              pool_k.stride(0), pool_k.stride(1), pool_v.stride(0), pool_v.stride(1), page_size, slot_pages,
              positions.const_data_ptr<int64_t>(), write_index.const_data_ptr<int64_t>(),
              node_offsets.const_data_ptr<int64_t>(), page_table.const_data_ptr<int64_t>(),
              prefix_lens.const_data_ptr<int64_t>(), tree_lens.const_data_ptr<int64_t>(),
              ancestors.const_data_ptr<int64_t>(), T, R, words, heads, kv_heads, Dk, Dv, window, chunk, float(scale), scoring,
              out.mutable_data_ptr<float>()};

  for (int64_t i = 0; i < T; ++i)  // negative: nowhere
    TORCH_CHECK(a.write_index[i] < pages * page_size, "write_index ", a.write_index[i], " is outside a pool of ", pages,
                " pages of ", page_size);
  for (int64_t i = 0; i < R * slot_pages; ++i)
    TORCH_CHECK(a.page_table[i] >= 0 && a.page_table[i] < pages, "page ", a.page_table[i], " of ", pages);
  for (int64_t i = 0; i < T; ++i) {
    if (a.write_index[i] < 0) continue;
    const int64_t page = a.write_index[i] / page_size, offset = a.write_index[i] % page_size;
    for (int64_t h = 0; h < kv_heads; ++h)
      store_token(a.k + h * a.k_head + i * a.k_token, Dk, a.v + h * a.v_head + i * a.v_token, Dv,
                  a.pool_k + page * a.pool_k_page + h * a.pool_k_head + offset * Dk,
                  a.pool_v + page * a.pool_v_page + h * a.pool_v_head + offset * Dv);
  }
  // Without pages the new nodes are all there is: they make a page of their own, of T tokens.
  Tensor new_k, new_v;
  static const int64_t first_page = 0;
  if (!slot_pages) {
    new_k = at::detail::empty_cpu({1, kv_heads, T, Dk}, at::kFloat);
    new_v = at::detail::empty_cpu({1, kv_heads, T, Dv}, at::kFloat);
    float *to_k = new_k.mutable_data_ptr<float>(), *to_v = new_v.mutable_data_ptr<float>();
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t i = 0; i < T; ++i)
        store_token(a.k + h * a.k_head + i * a.k_token, Dk, a.v + h * a.v_head + i * a.v_token, Dv,
                    to_k + (h * T + i) * Dk, to_v + (h * T + i) * Dv);
    a.pool_k = to_k, a.pool_v = to_v, a.pool_k_head = T * Dk, a.pool_v_head = T * Dv;
    a.page_table = &first_page, a.page_size = T, a.slot_pages = 1;
  }

  // Tasks by request and block of nodes; heads are the inner loop, so that neighbours share metadata.
  const int64_t group = heads / kv_heads, block = std::max<int64_t>(1, ROW_BLOCK / group);
  const int64_t threads = at::get_num_threads();
  int64_t rows_done = 0, units = 0, work = 0;
  for (int64_t r = 0; r < R; ++r) {
    const int64_t first = a.node_offsets[r], last = a.node_offsets[r + 1], length = a.prefix_lens[r] + a.tree_lens[r];
    TORCH_CHECK(0 <= first && first <= last && last <= T,
                "node_offsets must increase from 0 to at most ", T);
    TORCH_CHECK(a.prefix_lens[r] >= 0 && a.tree_lens[r] >= last - first && length <= a.slot_pages * a.page_size,
                "request ", r, " has ", length, " tokens, its slot ", a.slot_pages * a.page_size);
    TORCH_CHECK(!words || a.tree_lens[r] <= 64 * words, a.tree_lens[r], " nodes need more than ", words, " ancestor words");
    units += kv_heads * ((last - first + block - 1) / block);
    // a key and its value cost 1.5 units a float, each use of them a third (measured as for packed_linear)
    work += length * (Dk + Dv) * (3 * kv_heads / 2 + (last - first) * heads / 3);
    rows_done += last - first;
  }
  if (rows_done < T) out.zero_();

  const bool alone = !worth_threads(work);
  static thread_local std::vector<Task> tasks;
  static thread_local std::vector<float> partials;
  tasks.clear();
  const int64_t splits = alone || units >= threads || !units ? 1 : (threads + units - 1) / units;
  for (int64_t r = 0; r < R; ++r) {
    const int64_t chunks = (a.prefix_lens[r] + a.tree_lens[r] + CHUNK - 1) / CHUNK;
    for (int64_t first = a.node_offsets[r]; first < a.node_offsets[r + 1]; first += block)
      for (int64_t h = 0; h < kv_heads; ++h)
        for (int64_t s = 0; s < splits; ++s)
          tasks.push_back({r, h, first, std::min(first + block, a.node_offsets[r + 1]), chunks * s / splits,
                           chunks * (s + 1) / splits, s == 0, nullptr});
  }
  if (splits > 1) {
    const int64_t size = block * group * (padded(Dv) + 2);
    partials.resize(tasks.size() * size);
    for (size_t i = 0; i < tasks.size(); ++i) tasks[i].partial = partials.data() + i * size;
  }
  const Task* list = tasks.data();
  const int64_t count = tasks.size();
  if (alone) {
    for (int64_t i = 0; i < count; ++i) run_task(a, list[i]);
  } else {
    std::atomic<int64_t> next{0};  // tasks differ in length: who is free takes one
    at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) run_task(a, list[i]);
    });
  }
  if (splits > 1)
    for (int64_t i = 0; i < count; i += splits) merge(a, list + i, splits);
  return out.transpose(1, 2);
}

// The style of a rotation, of which there is none here, the one pattern that has a number: all of a path, and softmax.
Tensor tree_attention_numbered(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pool_k,
                               const Tensor& pool_v, const Tensor& positions, const Tensor& write_index,
                               const Tensor& node_offsets, const Tensor& page_table, const Tensor& prefix_lens,
                               const Tensor& tree_lens, const Tensor& ancestors, double scale, int64_t window,
                               int64_t chunk, double softcap, const std::optional<Tensor>& slopes,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& sinks,
                               const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t,
                               int64_t rotary, int64_t pattern, int64_t activation) {
  TORCH_CHECK(pattern == 0, "tree_attention knows no pattern number ", pattern);
  TORCH_CHECK(activation == 0, "this tree_attention knows no activation number ", activation);
  return tree_attention(q, k, v, pool_k, pool_v, positions, write_index, node_offsets, page_table, prefix_lens,
                        tree_lens, ancestors, scale, window, chunk, softcap, slopes, bias, sinks, cos, sin, "", rotary,
                        "", "softmax");
}

void commit_path(at::TensorList pools, const Tensor& src_in, const Tensor& dst_in) {
  const Tensor src = int64_input(src_in, src_in.numel(), "src"), dst = int64_input(dst_in, src_in.numel(), "dst");
  const int64_t n = src.numel();
  const int64_t *from = src.const_data_ptr<int64_t>(), *to = dst.const_data_ptr<int64_t>();
  for (const Tensor& pool : pools) {
    TORCH_CHECK(pool.dim() == 5 && pool.stride(4) == 1, "pool must be [sites, pages, heads, page size, D]");
    for (int64_t j = 0; j < n; ++j)
      TORCH_CHECK(std::min(to[j], from[j]) >= 0 && std::max(to[j], from[j]) < pool.size(1) * pool.size(3),
                  "src and dst must lie within the pool");
  }
  std::unordered_set<int64_t> written;
  for (int64_t j = 0; j < n; ++j) {
    TORCH_CHECK(!written.count(from[j]), "a token is read after it was overwritten: no dst may be a later src");
    if (from[j] != to[j]) written.insert(to[j]);
  }
  for (const Tensor& pool : pools) {
    const int64_t size = pool.size(3), bytes = pool.element_size(), token = pool.stride(3) * bytes;
    char* base = static_cast<char*>(pool.mutable_data_ptr());
    for (int64_t s = 0; s < pool.size(0); ++s)
      for (int64_t h = 0; h < pool.size(2); ++h)
        for (int64_t j = 0; j < n; ++j) {
          if (from[j] == to[j]) continue;
          char* head = base + (s * pool.stride(0) + h * pool.stride(2)) * bytes;
          const int64_t page = pool.stride(1) * bytes;
          std::memcpy(head + to[j] / size * page + to[j] % size * token,
                      head + from[j] / size * page + from[j] % size * token, pool.size(4) * bytes);
        }
  }
}

// [N, K] float32 -> [panels, blocks, bytes] in `bits` bits a level, or nothing where a group has none of the `levels`.
Tensor encoded(const Tensor& weight, int64_t bits, bool minimum, at::IntArrayRef levels) {
  TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == at::kFloat && weight.dim() == 2 &&
                  weight.size(1) % GROUP == 0 && levels.size() % 2 == 0 && (bits == 4 || bits == 5 || bits == 8),
              "encoded takes a contiguous float32 matrix whose columns are in blocks of 32, pairs of levels, 4, 5 or 8 bits");
  Tries tries;
  for (size_t i = 0; i < levels.size(); i += 2) tries.emplace_back(int(levels[i]), int(levels[i + 1]));
  const int64_t rows = weight.size(0), columns = weight.size(1), panels = (rows + PANEL - 1) / PANEL;
  const int64_t bytes = (minimum ? 4 : 2) * PANEL + (bits == 8 ? 32 : bits == 5 ? 20 : 16) * PANEL;
  Tensor packed = at::detail::empty_cpu({panels, columns / GROUP, bytes}, at::kByte);
  const float* from = weight.const_data_ptr<float>();
  char* to = reinterpret_cast<char*>(packed.mutable_data_ptr<uint8_t>());
  std::atomic<bool> all{true};
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const auto encode = bits == 4 ? encode_panel<4> : bits == 5 ? encode_panel<5> : encode_panel<8>;
    for (int64_t p = begin; p < end && all; ++p)
      if (!encode(from, rows, columns, p * PANEL, minimum, tries, to + p * (columns / GROUP) * bytes)) all = false;
  });
  return all ? packed : at::detail::empty_cpu({0}, at::kByte);
}

std::vector<int64_t> checksums(const std::vector<Tensor>& tensors) {
  struct Block {
    const char* bytes;
    int64_t count;
  };
  std::vector<Block> blocks;
  int64_t total = 0;
  for (const Tensor& t : tensors) {
    TORCH_CHECK(t.is_contiguous(), "checksums takes contiguous tensors");
    const char* bytes = static_cast<const char*>(t.const_data_ptr());
    const int64_t count = t.nbytes();
    for (int64_t at = 0; at < count; at += SUM_BLOCK) blocks.push_back({bytes + at, std::min(SUM_BLOCK, count - at)});
    total += count;
  }
  std::vector<uint64_t> sums(blocks.size());
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = checksum(blocks[i].bytes, blocks[i].count);
  };
  if (worth_threads(total)) {  // 20 bytes a ns
    at::parallel_for(0, blocks.size(), 1, run);
  } else {
    run(0, blocks.size());
  }
  std::vector<int64_t> results;
  size_t next = 0;
  for (const Tensor& t : tensors) {
    uint64_t sum = t.nbytes();
    for (int64_t at = 0; at < int64_t(t.nbytes()); at += SUM_BLOCK) sum = mix(sum, sums[next++]);
    results.push_back(int64_t(sum));
  }
  return results;
}

}  // namespace
}  // namespace treespec

TORCH_LIBRARY_IMPL(treespec_cpu, CPU, m) {
  m.impl("packed_linear", TORCH_FN(treespec::packed_linear));
  m.impl("packed_linear.numbered", TORCH_FN(treespec::packed_linear_numbered));
  m.impl("packed_embedding", TORCH_FN(treespec::packed_embedding));
  m.impl("packed_embedding.numbered", TORCH_FN(treespec::packed_embedding_numbered));
  m.impl("tree_attention", TORCH_FN(treespec::tree_attention));
  m.impl("tree_attention.numbered", TORCH_FN(treespec::tree_attention_numbered));
  m.impl("commit_path", TORCH_FN(treespec::commit_path));
  m.impl("checksums", TORCH_FN(treespec::checksums));
  m.impl("encoded", TORCH_FN(treespec::encoded));
}
