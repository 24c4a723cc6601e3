#define JPA_ISA avx2
#define JPA_ISA_AVX2
#include "test_simd.h"

void TestSimd_avx2() { jpa::cpu::avx2::TestAll(); }
