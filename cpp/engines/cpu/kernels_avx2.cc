// The kernels for AVX2, FMA and F16C. Flags: see CMakeLists.txt.
#define JPA_ISA avx2
#define JPA_ISA_AVX2
#include "engines/cpu/kernel_table.h"
