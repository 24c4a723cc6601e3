// Names of dtypes in messages, as JAX spells them.
#pragma once

#include "core/problem.h"

namespace jpa {

constexpr const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "float32";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    case DType::kE4M3FN:
      return "float8_e4m3fn";
    case DType::kE5M2:
      return "float8_e5m2";
    case DType::kS8:
      return "int8";
  }
  return "";
}

}  // namespace jpa
