// The buffers that a call must have: a mismatch becomes a status that names the argument, what was expected
// and what came.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.h"
#include "core/status.h"
#include "ffi/bind.h"
#include "xla/ffi/api/ffi.h"

namespace jpa {

inline std::string ShapeOf(const ffi::AnyBuffer& buffer) {
  std::string text = "[";
  for (const int64_t dim : buffer.dimensions()) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

inline const char* NameOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F8E5M2:
      return "float8_e5m2";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::S32:
      return "int32";
    default:
      return "another dtype";
  }
}

inline Status Mismatch(const NamedBuffer& argument, const std::string& expected) {
  return Status::InvalidArgument(std::string(argument.spec->name) + ": expected " + expected + ", got " +
                                 NameOf(argument.dtype()) + ShapeOf(argument.buffer));
}

inline Status ExpectRank(const NamedBuffer& argument, const char* shape) {
  return argument.rank() == argument.spec->rank ? Status::Ok()
                                                : Mismatch(argument, std::string("shape ") + shape);
}

inline Status ExpectRank(const NamedBuffer& argument) { return ExpectRank(argument, argument.spec->shape); }

// Both dtype and shape, where all sizes are known.
inline Status Expect(const NamedBuffer& argument, ffi::DataType dtype, const std::vector<int64_t>& shape) {
  bool same = argument.dtype() == dtype && argument.rank() == shape.size();
  std::string text = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    same = same && argument.dim(axis) == shape[axis];
    text += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  }
  return same ? Status::Ok() : Mismatch(argument, std::string(NameOf(dtype)) + text + "]");
}

// The same for a tensor whose dtype the table fixes.
inline Status Expect(const NamedBuffer& argument, const std::vector<int64_t>& shape) {
  switch (argument.spec->dtype) {
    case ElementType::kF32:
      return Expect(argument, ffi::DataType::F32, shape);
    case ElementType::kS32:
      return Expect(argument, ffi::DataType::S32, shape);
    case ElementType::kU8:
      return Expect(argument, ffi::DataType::U8, shape);
    case ElementType::kFloat:
    case ElementType::kPages:
      break;
  }
  return Status::Internal(std::string(argument.spec->name) + ": its dtype depends on the call");
}

// The dtype and shape of another tensor.
inline Status ExpectLike(const NamedBuffer& argument, const NamedBuffer& other) {
  const auto dims = other.buffer.dimensions();
  return Expect(argument, other.dtype(), {dims.begin(), dims.end()});
}

// [X, columns] in f32, where X is 0 or divides `period`.
inline Status ExpectRepeated(const NamedBuffer& argument, int64_t columns, int64_t period,
                             const char* letter) {
  const bool fits = argument.dtype() == ffi::DataType::F32 && argument.rank() == 2 &&
                    argument.dim(1) == columns && (argument.dim(0) == 0 || period % argument.dim(0) == 0);
  if (fits) return Status::Ok();
  return Mismatch(argument, "float32[X, " + std::to_string(columns) + "] where X is 0 or divides " + letter +
                                " = " + std::to_string(period));
}

inline bool ParseDType(ffi::DataType dtype, DType* parsed) {
  switch (dtype) {
    case ffi::DataType::F32:
      *parsed = DType::kF32;
      return true;
    case ffi::DataType::BF16:
      *parsed = DType::kBF16;
      return true;
    case ffi::DataType::F16:
      *parsed = DType::kF16;
      return true;
    case ffi::DataType::F8E4M3FN:
      *parsed = DType::kE4M3FN;
      return true;
    case ffi::DataType::F8E5M2:
      *parsed = DType::kE5M2;
      return true;
    case ffi::DataType::S8:
      *parsed = DType::kS8;
      return true;
    default:
      return false;
  }
}

inline Status ParseFloating(const NamedBuffer& argument, DType* dtype) {
  if (ParseDType(argument.dtype(), dtype) && ByteWidth(*dtype) > 1) return Status::Ok();
  return Mismatch(argument, "float32, bfloat16 or float16");
}

}  // namespace jpa
