// The products of float32 and of the forms whose values stand alone or in groups with a step.
#include "products.h"

#include "product_of.h"

namespace treespec {

Strip float32_strip(int rows) { return STRIPS<Float32>[rows]; }

const Product* find_product(std::string_view form) {
  if (form == "float32") return &PRODUCT<Float32>;
  if (form == "bfloat16") return &PRODUCT<BFloat16>;
  if (form == "float16") return &PRODUCT<Float16>;
  if (form == "q8_0") return &PRODUCT<Bytes<false>>;
  if (form == "i4") return &PRODUCT<Nibbles<false, 4, true>>;
  if (form == "i8") return &PRODUCT<Bytes<true>>;
  return find_product_of_blocks(form);
}

}  // namespace treespec
