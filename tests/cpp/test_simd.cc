// Runs test_simd.h for every instruction set of this machine.
#include <cstring>

#include "check.h"
#include "engines/cpu/isa.h"

void TestSimd_baseline();
#ifdef JPA_HAVE_X86_KERNELS
void TestSimd_avx2();
void TestSimd_avx512();
#endif

int main() {
  for (const jpa::cpu::Kernels* kernels : jpa::cpu::AvailableKernels()) {
    const int before = jpa::test::failures;
    if (std::strcmp(kernels->name, "baseline") == 0) TestSimd_baseline();
#ifdef JPA_HAVE_X86_KERNELS
    if (std::strcmp(kernels->name, "avx2") == 0) TestSimd_avx2();
    if (std::strcmp(kernels->name, "avx512") == 0) TestSimd_avx512();
#endif
    std::printf("%s: %d failures\n", kernels->name, jpa::test::failures - before);
  }
  return jpa::test::failures == 0 ? 0 : 1;
}
