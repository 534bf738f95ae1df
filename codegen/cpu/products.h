// What the ops need of a form in which weights are stored. The products of each are compiled apart from torch's headers,
// in files of their own: compilers take most of their time for them, and do so side by side.
#pragma once
#include <cstdint>
#include <string_view>

namespace treespec {

struct Product {
  int64_t k_block, bytes, runs, reading;  // of its struct in forms.h
  // out[M, N] for the panels [begin, end): x, M, K, packed, bias or null, out, N, begin, end
  void (*panels)(const float*, int64_t, int64_t, const char*, const float*, float*, int64_t, int64_t, int64_t);
  // out[K], the weights of one output: panel, K, its number in the panel, out
  void (*column)(const char*, int64_t, int, float*);
};

// Null for a name that no form has.
const Product* find_product(std::string_view form);
const Product* find_product_of_blocks(std::string_view form);

}  // namespace treespec
