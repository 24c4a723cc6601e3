// The kernels for whatever the target guarantees: SSE2 on x86-64, NEON on arm64. Flags: see CMakeLists.txt.
#define JPA_ISA baseline
#include "engines/cpu/kernel_table.h"
