// The tables of targets.h as Python objects.
#pragma once

#include <nanobind/nanobind.h>

#include "ffi/targets.h"

namespace jpa {

namespace nb = nanobind;

// {"operands": names, "results": names, "attributes": names}, in the order of the tables.
template <typename Table, typename Attributes>
nb::dict NamesOf(const Table& table, const Attributes& specs, const Target& target) {
  nb::list operands, results;
  for (size_t i = 0; i < table.tensors.size(); ++i) {
    if (!table.tensors[i].BelongsTo(target)) continue;
    (i < Table::kNumOperands ? operands : results).append(table.tensors[i].name);
  }
  nb::dict names;
  names["operands"] = operands;
  names["results"] = results;
  nb::list attributes;
  for (const AttributeSpec& spec : specs) {
    if (spec.BelongsTo(target)) attributes.append(spec.name);
  }
  names["attributes"] = attributes;
  return names;
}

inline void DefineTargets(nb::module_& m, Platform platform) {
  m.def(
      "targets",
      [platform] {
        nb::dict targets;
        int version = 0;
        for (const char* name : {kAttentionV1, kAttentionV2, kAttentionV3, kAttentionV4, kAttentionV5}) {
          if (++version >= kCumulativeSince && platform == Platform::kCpu) break;
          targets[name] = NamesOf(kAttentionTensors, kAttentionAttributes, {platform, version});
        }
        version = 0;
        for (const char* name : {kWriteV1, kWriteV2, kWriteV3}) {
          targets[name] = NamesOf(kWriteTensors, kWriteAttributes, {platform, ++version});
        }
        return targets;
      },
      nb::sig("def targets() -> dict[str, dict[str, list[str]]]"),
      "Names of the `operands`, `results` and `attributes` of each FFI target, in order.");
}

}  // namespace jpa
