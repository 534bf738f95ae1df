// The products of GGUF's blocks of four, five and six bits.
#include "product_of.h"
#include "products.h"

namespace treespec {

const Product* find_product_of_blocks(std::string_view form) {
  if (form == "q4_0") return &PRODUCT<Nibbles<false>>;
  if (form == "q4_1") return &PRODUCT<Nibbles<true>>;
  if (form == "q5_0") return &PRODUCT<Nibbles<false, 5>>;
  if (form == "q5_1") return &PRODUCT<Nibbles<true, 5>>;
  if (form == "q4_k") return &PRODUCT<BitsK<4>>;
  if (form == "q5_k") return &PRODUCT<BitsK<5>>;
  if (form == "q6_k") return &PRODUCT<SixBitsK>;
  return nullptr;
}

}  // namespace treespec
