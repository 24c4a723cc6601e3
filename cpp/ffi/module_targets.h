// The tables of targets.h as Python objects.
#pragma once

#include <nanobind/nanobind.h>

#include "ffi/targets.h"

namespace jpa {

namespace nb = nanobind;

// {"operands": names, "results": names, "attributes": names}, in the order of the table.
template <typename Table>
nb::dict NamesOf(const Table& table) {
  nb::list operands, results;
  for (size_t i = 0; i < table.tensors.size(); ++i) {
    (i < Table::kNumOperands ? operands : results).append(table.tensors[i].name);
  }
  nb::dict names;
  names["operands"] = operands;
  names["results"] = results;
  names["attributes"] = nb::list();
  return names;
}

inline nb::dict AttentionNames(const AttentionTarget& target) {
  nb::list attributes;
  for (const AttributeSpec& spec : kAttentionAttributes) {
    if (spec.BelongsTo(target)) attributes.append(spec.name);
  }
  nb::dict names = NamesOf(kAttentionTensors);
  names["attributes"] = attributes;
  return names;
}

inline void DefineTargets(nb::module_& m, Platform platform) {
  m.def(
      "targets",
      [platform] {
        nb::dict targets;
        targets[kAttentionV1] = AttentionNames({.platform = platform, .version = 1});
        targets[kAttentionV2] = AttentionNames({.platform = platform, .version = 2});
        targets[kWriteV1] = NamesOf(kWriteTensors);
        return targets;
      },
      nb::sig("def targets() -> dict[str, dict[str, list[str]]]"),
      "Names of the `operands`, `results` and `attributes` of each FFI target, in order.");
}

}  // namespace jpa
