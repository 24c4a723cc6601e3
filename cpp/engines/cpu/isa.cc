#include "engines/cpu/isa.h"

#include <cstdlib>

#ifdef JPA_HAVE_X86_KERNELS
#include <cpuid.h>
#endif

namespace jpa::cpu {
namespace {

#ifdef JPA_HAVE_X86_KERNELS
bool HasF16C() {  // not a name that every compiler's __builtin_cpu_supports knows
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16C(); }

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct Choice {
  const Kernels* kernels = nullptr;
  std::string error;
};

Choice Choose() {
  const char* wish = std::getenv("JPA_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return {.kernels = AvailableKernels().front(), .error = {}};
  std::string names;
  for (const Kernels* kernels : AvailableKernels()) {
    if (std::string(wish) == kernels->name) return {.kernels = kernels, .error = {}};
    names += names.empty() ? "" : ", ";
    names += kernels->name;
  }
  return {.kernels = nullptr,
          .error = "JPA_CPU_ISA: expected one of " + names + " on this machine, got '" + wish + "'"};
}

}  // namespace

const std::vector<const Kernels*>& AvailableKernels() {
  static const std::vector<const Kernels*> available = [] {
    std::vector<const Kernels*> found;
#ifdef JPA_HAVE_X86_KERNELS
    if (HasAvx512()) found.push_back(&avx512::GetKernels());
    if (HasAvx2()) found.push_back(&avx2::GetKernels());
#endif
    found.push_back(&baseline::GetKernels());
    return found;
  }();
  return available;
}

Status ChosenKernels(const Kernels** kernels) {
  static const Choice choice = Choose();
  if (choice.kernels == nullptr) return Status::InvalidArgument(choice.error);
  *kernels = choice.kernels;
  return Status::Ok();
}

}  // namespace jpa::cpu
