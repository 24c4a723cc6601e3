// From an engine's Status, or an exception of the standard library, to XLA's errors.
#pragma once

#include <exception>
#include <new>

#include "core/status.h"
#include "xla/ffi/api/ffi.h"

namespace jpa {

namespace ffi = ::xla::ffi;

inline ffi::Error ToError(const Status& status) {
  switch (status.code()) {
    case Status::Code::kOk:
      return ffi::Error::Success();
    case Status::Code::kInvalidArgument:
      return ffi::Error::InvalidArgument(status.message());
    case Status::Code::kResourceExhausted:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, status.message());
    case Status::Code::kInternal:
      break;
  }
  return ffi::Error::Internal(status.message());
}

// Runs `call` and turns what the standard library may throw into an error: nothing may unwind into XLA.
template <typename Call>
ffi::Error Guard(const Call& call) {
  try {
    return ToError(call());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory on the host");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

}  // namespace jpa
