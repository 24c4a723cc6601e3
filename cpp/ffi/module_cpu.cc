// The Python module jax_paged_attn._cpu: what to register with XLA, and what was built.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/workspace.h"
#include "engines/cpu/isa.h"
#include "ffi/handler_cpu.h"
#include "ffi/module_targets.h"

namespace nb = nanobind;

namespace {

nb::dict Registrations() {
  nb::dict targets;
  targets[jpa::kAttentionV1] = nb::capsule(jpa::AttentionV1CpuHandler());
  targets[jpa::kAttentionV2] = nb::capsule(jpa::AttentionV2CpuHandler());
  targets[jpa::kAttentionV3] = nb::capsule(jpa::AttentionV3CpuHandler());
  targets[jpa::kAttentionV4] = nb::capsule(jpa::AttentionV4CpuHandler());
  targets[jpa::kWriteV1] = nb::capsule(jpa::WriteV1CpuHandler());
  targets[jpa::kWriteV2] = nb::capsule(jpa::WriteV2CpuHandler());
  targets[jpa::kWriteV3] = nb::capsule(jpa::WriteV3CpuHandler());
  return targets;
}

std::string Isa() {
  const jpa::cpu::Kernels* kernels = nullptr;
  if (jpa::Status status = jpa::cpu::ChosenKernels(&kernels); !status.ok()) {
    throw std::runtime_error(status.message());
  }
  return kernels->name;
}

std::vector<std::string> AvailableIsas() {
  std::vector<std::string> names;
  for (const jpa::cpu::Kernels* kernels : jpa::cpu::AvailableKernels()) names.emplace_back(kernels->name);
  return names;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["compiler"] = JPA_COMPILER;
  info["ffi_api"] = jpa::FfiApiVersion();
  return info;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "The CPU engine of jax_paged_attn: XLA FFI handlers and facts about the build.";
  m.def("registrations", &Registrations, nb::sig("def registrations() -> dict[str, object]"),
        "Handlers by the name of their FFI target, for platform \"cpu\".");
  jpa::DefineTargets(m, jpa::Platform::kCpu);
  m.def("attention_workspace_bytes", &jpa::AttentionWorkspaceBytes, nb::arg("num_seqs"),
        nb::arg("num_q_heads"), nb::arg("value_dim"),
        "Size of the workspace result of the attention target.");
  m.def("isa", &Isa,
        "Instruction set in use: the best available, or JPA_CPU_ISA. RuntimeError if that one is not "
        "available.");
  m.def("available_isas", &AvailableIsas, "Instruction sets that this machine can run, fastest first.");
  m.def("build_info", &BuildInfo, nb::sig("def build_info() -> dict[str, str]"),
        "The compiler, and the version of the XLA FFI headers.");
}
