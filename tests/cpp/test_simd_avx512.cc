#define JPA_ISA avx512
#define JPA_ISA_AVX512
#include "test_simd.h"

void TestSimd_avx512() { jpa::cpu::avx512::TestAll(); }
