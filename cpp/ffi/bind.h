// Tensors and attributes of a call by name, as the tables of targets.h list them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/status.h"
#include "ffi/targets.h"
#include "xla/ffi/api/ffi.h"

namespace jpa {

namespace ffi = ::xla::ffi;

// A buffer and what the table says of it.
struct NamedBuffer {
  const TensorSpec* spec;
  ffi::AnyBuffer buffer;

  ffi::DataType dtype() const { return buffer.element_type(); }
  int64_t dim(size_t axis) const { return buffer.dimensions()[axis]; }
  size_t rank() const { return buffer.dimensions().size(); }
  template <typename T>
  T* data() const {
    return static_cast<T*>(buffer.untyped_data());
  }
  template <typename T>
  T* data_or_null() const {
    return dim(0) == 0 ? nullptr : data<T>();
  }
};

// The buffers of a call, one per entry of the table.
template <const auto& table>
class Tensors {
 public:
  struct Name {
    size_t index;
    consteval Name(const char* name) : index(IndexOf(table.tensors, name)) {}
  };

  // The tensors of the target's version; there is no buffer for later ones.
  static Status Bind(const Target& target, const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                     Tensors* bound) {
    constexpr size_t kNumResults = table.kNumResults;
    const size_t num_operands = table.NumOperands(target);
    if (args.size() != num_operands || rets.size() != kNumResults) {
      return Status::InvalidArgument(std::string(table.function) + ": expected " +
                                     std::to_string(num_operands) + " operands and " +
                                     std::to_string(kNumResults) + " results, got " +
                                     std::to_string(args.size()) + " and " + std::to_string(rets.size()));
    }
    size_t next = 0;  // operand
    for (size_t i = 0; i < table.tensors.size(); ++i) {
      const TensorSpec& spec = table.tensors[i];
      if (!spec.BelongsTo(target)) continue;
      if (i < table.kNumOperands) {
        if (auto operand = args.get<ffi::AnyBuffer>(next++); operand.has_value()) {
          bound->buffers_[i] = {.spec = &spec, .buffer = *operand};
        }
      } else if (auto result = rets.get<ffi::AnyBuffer>(i - table.kNumOperands); result.has_value()) {
        bound->buffers_[i] = {.spec = &spec, .buffer = **result};
      }
      if (!bound->buffers_[i]) return Status::InvalidArgument(std::string(spec.name) + ": expected a buffer");
    }
    return Status::Ok();
  }

  const NamedBuffer& operator[](Name name) const { return *buffers_[name.index]; }
  bool Has(Name name) const { return buffers_[name.index].has_value(); }

 private:
  std::array<std::optional<NamedBuffer>, table.tensors.size()> buffers_;
};

using AttentionTensors = Tensors<kAttentionTensors>;
using WriteTensors = Tensors<kWriteTensors>;

// ---- attributes ------------------------------------------------------------------------------------------

struct AttentionAttributes {
  float scale = 1.0f;
  float soft_cap = 0.0f;
  int64_t sliding_window = 0;
  bool causal = true;
  bool decode = false;           // sequence b has row b of q alone: q_starts and q_counts are empty
  bool batch_invariant = false;  // only "fused" guarantees it
  std::string_view engine = "";  // on CUDA: "fused" or "cublaslt"
  int64_t workspace_limit = 0;   // on CUDA, in bytes
  std::string_view layout = "split";
};

struct WriteAttributes {
  std::string_view layout = "split";
};

template <const auto& specs>
Status ExpectAttributes(const ffi::Dictionary& dictionary, const Target& target) {
  size_t num_expected = 0;
  bool complete = true;
  for (const AttributeSpec& spec : specs) {
    if (!spec.BelongsTo(target)) continue;
    ++num_expected;
    complete = complete && dictionary.contains(spec.name);
  }
  if (complete && dictionary.size() == num_expected) return Status::Ok();
  std::string expected, got;
  for (const AttributeSpec& spec : specs) {
    if (spec.BelongsTo(target)) expected += (expected.empty() ? "" : ", ") + std::string(spec.name);
  }
  for (const std::string_view name : dictionary) got += (got.empty() ? "" : ", ") + std::string(name);
  return Status::InvalidArgument("attributes: expected " + expected + ", got " + got);
}

// Reads attributes of a call, those that belong to `target`; the others keep their values.
template <const auto& specs>
class AttributeReader {
 public:
  struct Name {
    size_t index;
    consteval Name(const char* name) : index(IndexOf(specs, name)) {}
  };

  AttributeReader(const ffi::Dictionary& dictionary, const Target& target)
      : dictionary_(dictionary), target_(target), status_(ExpectAttributes<specs>(dictionary, target)) {}

  template <typename T>
  void Read(Name name, T* value) {
    const AttributeSpec& spec = specs[name.index];
    if (!spec.BelongsTo(target_) || !status_.ok()) return;
    if (ffi::ErrorOr<T> got = dictionary_.get<T>(spec.name); got.has_value()) {
      *value = *got;
    } else {
      status_ = Status::InvalidArgument(std::string(spec.name) + ": " + got.error().message());
    }
  }

  // The first error of all that was read.
  const Status& status() const { return status_; }

 private:
  const ffi::Dictionary& dictionary_;
  const Target target_;
  Status status_;
};

inline Status ReadAttributes(const ffi::Dictionary& dictionary, const Target& target,
                             AttentionAttributes* attributes) {
  AttributeReader<kAttentionAttributes> reader(dictionary, target);
  reader.Read("scale", &attributes->scale);
  reader.Read("soft_cap", &attributes->soft_cap);
  reader.Read("sliding_window", &attributes->sliding_window);
  reader.Read("causal", &attributes->causal);
  reader.Read("decode", &attributes->decode);
  reader.Read("batch_invariant", &attributes->batch_invariant);
  reader.Read("engine", &attributes->engine);
  reader.Read("workspace_limit", &attributes->workspace_limit);
  reader.Read("layout", &attributes->layout);
  return reader.status();
}

inline Status ReadAttributes(const ffi::Dictionary& dictionary, const Target& target,
                             WriteAttributes* attributes) {
  AttributeReader<kWriteAttributes> reader(dictionary, target);
  reader.Read("layout", &attributes->layout);
  return reader.status();
}

}  // namespace jpa
