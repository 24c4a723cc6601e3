// Makes the plan of schedule.h in a kernel of its own, which runs beside the start of decode.
#include "device/launch.h"
#include "device/ptx.cuh"
#include "engines/fused/prefill/kernels.h"
#include "engines/fused/prefill/make_plan.cuh"

namespace jpa::fused {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) ScheduleKernel(const __grid_constant__ PrefillArgs args) {
  __shared__ PlanShared<kThreads> shared;
  device::LetNextKernelStart();
  MakePlan(args.call, args, OrderedRowsOf<kThreads>(args.call), shared);
}

}  // namespace

Status LaunchSchedule(const PrefillArgs& args, cudaStream_t stream) {
  return device::Launch("implementation 'fused'", "schedule", &ScheduleKernel,
                        {.grid = dim3(1), .threads = kThreads}, stream, args);
}

}  // namespace jpa::fused
