// A form's product, of what linear.h makes of its struct.
#pragma once
#include "linear.h"
#include "products.h"

namespace treespec {

template <class Form>
constexpr Product PRODUCT = {
    Form::K_BLOCK, Form::BYTES, RUNS<Form>, Form::READING, linear_panels<Form>, widen_column<Form>};

}  // namespace treespec
