#define JPA_ISA baseline
#include "test_simd.h"

void TestSimd_baseline() { jpa::cpu::baseline::TestAll(); }
