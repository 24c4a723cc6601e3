// Errors as values: no exception crosses the FFI boundary.
#pragma once

#include <string>
#include <utility>

namespace jpa {

class [[nodiscard]] Status {
 public:
  enum class Code { kOk, kInvalidArgument, kResourceExhausted, kInternal };

  static Status Ok() { return Status(Code::kOk, {}); }
  static Status InvalidArgument(std::string message) {
    return Status(Code::kInvalidArgument, std::move(message));
  }
  static Status ResourceExhausted(std::string message) {
    return Status(Code::kResourceExhausted, std::move(message));
  }
  static Status Internal(std::string message) { return Status(Code::kInternal, std::move(message)); }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  Code code_;
  std::string message_;
};

}  // namespace jpa
