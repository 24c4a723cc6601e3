// Names of layouts, as jax_paged_attn/_layouts.py has them.
#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "core/problem.h"
#include "core/status.h"

namespace jpa {

inline Status ParseLayout(std::string_view name, PageLayout* layout) {
  for (const auto& [known, value] : {std::pair{"split", PageLayout::kSplit},
                                     {"interleaved", PageLayout::kInterleaved},
                                     {"head_major", PageLayout::kHeadMajor},
                                     {"values_in_keys", PageLayout::kValuesInKeys}}) {
    if (name == known) {
      *layout = value;
      return Status::Ok();
    }
  }
  return Status::InvalidArgument("layout: expected split, interleaved, head_major or values_in_keys, got " +
                                 std::string(name));
}

}  // namespace jpa
