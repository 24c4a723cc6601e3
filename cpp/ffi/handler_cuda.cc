#include "ffi/handler_cuda.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <utility>

#include "device/cuda_status.h"
#include "engines/cublaslt/run.h"
#include "engines/fused/run.h"
#include "ffi/guard.h"
#include "ffi/parse.h"

namespace jpa {

// The attributes of target v1 on CUDA.
struct AttentionCudaAttributes {
  float scale;
  float soft_cap;
  int64_t sliding_window;
  bool causal;
  bool decode;
  bool batch_invariant;     // only "fused" promises it
  std::string_view engine;  // "fused" or "cublaslt"
  int64_t workspace_limit;
  std::string_view layout = "split";
};

// Those of v2: the layout as well.
struct AttentionCudaAttributesV2 : AttentionCudaAttributes {};

}  // namespace jpa

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jpa::AttentionCudaAttributes, ::xla::ffi::StructMember<float>("scale"),
                                      ::xla::ffi::StructMember<float>("soft_cap"),
                                      ::xla::ffi::StructMember<int64_t>("sliding_window"),
                                      ::xla::ffi::StructMember<bool>("causal"),
                                      ::xla::ffi::StructMember<bool>("decode"),
                                      ::xla::ffi::StructMember<bool>("batch_invariant"),
                                      ::xla::ffi::StructMember<std::string_view>("engine"),
                                      ::xla::ffi::StructMember<int64_t>("workspace_limit"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jpa::AttentionCudaAttributesV2, ::xla::ffi::StructMember<float>("scale"),
    ::xla::ffi::StructMember<float>("soft_cap"), ::xla::ffi::StructMember<int64_t>("sliding_window"),
    ::xla::ffi::StructMember<bool>("causal"), ::xla::ffi::StructMember<bool>("decode"),
    ::xla::ffi::StructMember<bool>("batch_invariant"), ::xla::ffi::StructMember<std::string_view>("engine"),
    ::xla::ffi::StructMember<int64_t>("workspace_limit"),
    ::xla::ffi::StructMember<std::string_view>("layout"));

namespace jpa {
namespace {

std::atomic<int64_t> host_calls{0};

bool IsFused(const AttentionCudaAttributes& attributes) { return attributes.engine == "fused"; }

// What a call site of a compiled program keeps: its sizes never change, so what its engine makes ready once a
// device stays right. Threads share it.
class AttentionState {
 public:
  static ffi::TypeId id;

  struct OnDevice {
    fused::Device fused;
    cublaslt::Plan plan;
    std::unique_ptr<cublaslt::Products> products;
  };

  // For the current device. Costs a lock and a look-up after the first call there.
  Status Get(const AttentionProblem& problem, const AttentionCudaAttributes& attributes,
             const OnDevice** found) {
    int device = 0;
    if (Status s = device::CudaStatus(cudaGetDevice(&device), "attention", "no current CUDA device"); !s.ok())
      return s;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<OnDevice>& here = devices_[device];
    if (here == nullptr) {
      auto made = std::make_unique<OnDevice>();
      if (Status s = Make(problem, attributes, made.get()); !s.ok()) return s;
      here = std::move(made);
    }
    *found = here.get();
    return Status::Ok();
  }

 private:
  static Status Make(const AttentionProblem& problem, const AttentionCudaAttributes& attributes,
                     OnDevice* made) {
    if (IsFused(attributes)) return fused::Prepare(problem, &made->fused);
    made->plan = cublaslt::MakePlan(problem, attributes.decode, attributes.workspace_limit);
    return cublaslt::Products::Make(problem, made->plan, &made->products);
  }

  std::mutex mutex_;
  std::map<int, std::unique_ptr<OnDevice>> devices_;
};

ffi::TypeId AttentionState::id = {};
constexpr ffi::TypeInfo kStateInfo = ffi::MakeTypeInfo<AttentionState>();

// One call, parsed.
struct ParsedCall {
  AttentionProblem problem;
  AttentionParams params;
  int64_t workspace_bytes;
};

Status Parse(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
             const AttentionCudaAttributes& attributes, ParsedCall* call) {
  constexpr std::array<const char*, 13> kNames = {
      "q",     "k_pages", "v_pages", "block_tables", "kv_lens", "q_starts", "q_counts",
      "sinks", "k_scale", "v_scale", "out",          "lse",     "workspace"};
  constexpr size_t kNumArgs = 10, kNumRets = 3;
  if (args.size() != kNumArgs || rets.size() != kNumRets) {
    return Status::InvalidArgument("attention: expected 10 operands and 3 results, got " +
                                   std::to_string(args.size()) + " and " + std::to_string(rets.size()));
  }
  std::vector<NamedBuffer> buffers;
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (i < kNumArgs) {
      ffi::ErrorOr<ffi::AnyBuffer> buffer = args.get<ffi::AnyBuffer>(i);
      if (!buffer.has_value()) return Status::InvalidArgument(std::string(kNames[i]) + ": expected a buffer");
      buffers.push_back({kNames[i], *buffer});
    } else {
      ffi::ErrorOr<ffi::Result<ffi::AnyBuffer>> buffer = rets.get<ffi::AnyBuffer>(i - kNumArgs);
      if (!buffer.has_value()) return Status::InvalidArgument(std::string(kNames[i]) + ": expected a buffer");
      buffers.push_back({kNames[i], **buffer});
    }
  }
  if (!IsFused(attributes) && attributes.engine != "cublaslt") {
    return Status::InvalidArgument("implementation: expected fused or cublaslt, got " +
                                   std::string(attributes.engine));
  }
  if (attributes.batch_invariant && !IsFused(attributes)) {
    return Status::InvalidArgument("batch_invariant: expected implementation fused, got " +
                                   std::string(attributes.engine));
  }
  if (attributes.workspace_limit < 0) {
    return Status::InvalidArgument("workspace_limit: expected a number >= 0, got " +
                                   std::to_string(attributes.workspace_limit));
  }
  const AttentionBuffers named = {buffers[0],  buffers[1],  buffers[2], buffers[3], buffers[4],
                                  buffers[5],  buffers[6],  buffers[7], buffers[8], buffers[9],
                                  buffers[10], buffers[11], buffers[12]};
  const AttentionAttributes shared = {attributes.scale,  attributes.soft_cap, attributes.sliding_window,
                                      attributes.causal, attributes.decode,   attributes.layout};
  if (Status s = ParseAttention(named, shared, &call->problem, &call->params); !s.ok()) return s;
  call->workspace_bytes = named.workspace.dim(0);
  return Status::Ok();
}

ffi::ErrorOr<std::unique_ptr<AttentionState>> Instantiate() { return std::make_unique<AttentionState>(); }

// Before the first execution on a device, and never while a graph is being captured.
ffi::Error Initialize(AttentionState* state, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      AttentionCudaAttributes attributes) {
  return Guard([&] {
    ParsedCall call;
    if (Status s = Parse(args, rets, attributes, &call); !s.ok()) return s;
    const AttentionState::OnDevice* device;
    return state->Get(call.problem, attributes, &device);
  });
}

ffi::Error Execute(cudaStream_t stream, AttentionState* state, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, AttentionCudaAttributes attributes) {
  return Guard([&] {
    host_calls.fetch_add(1, std::memory_order_relaxed);
    ParsedCall call;
    if (Status s = Parse(args, rets, attributes, &call); !s.ok()) return s;
    const AttentionState::OnDevice* device;
    if (Status s = state->Get(call.problem, attributes, &device); !s.ok()) return s;
    if (IsFused(attributes)) {
      const fused::Options options = {attributes.decode, attributes.batch_invariant,
                                      attributes.workspace_limit};
      return fused::RunAttention(call.problem, call.params, options, device->fused, call.workspace_bytes,
                                 stream);
    }
    return cublaslt::RunAttention(call.problem, call.params, device->plan, *device->products,
                                  call.workspace_bytes, stream);
  });
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, ffi::Ffi::BindInstantiate());

template <typename Attributes>
auto BindInitialize() {
  return ffi::Ffi::BindInitialize()
      .Ctx<ffi::State<AttentionState>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<Attributes>();
}

template <typename Attributes>
auto BindExecute() {
  return ffi::Ffi::BindExecute()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::State<AttentionState>>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<Attributes>();
}

XLA_FFI_DEFINE_HANDLER(kInitializeV1, Initialize, BindInitialize<AttentionCudaAttributes>());
XLA_FFI_DEFINE_HANDLER(kInitializeV2, Initialize, BindInitialize<AttentionCudaAttributesV2>());

// The same launches at every call of a compiled program, whatever the arrays hold, so a command buffer may
// hold them.
XLA_FFI_DEFINE_HANDLER(kExecuteV1, Execute, BindExecute<AttentionCudaAttributes>(),
                       {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kExecuteV2, Execute, BindExecute<AttentionCudaAttributesV2>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

AttentionCudaHandlers AttentionV1CudaHandlers() {
  return {reinterpret_cast<void*>(kInstantiate), reinterpret_cast<void*>(kInitializeV1),
          reinterpret_cast<void*>(kExecuteV1)};
}

AttentionCudaHandlers AttentionV2CudaHandlers() {
  return {reinterpret_cast<void*>(kInstantiate), reinterpret_cast<void*>(kInitializeV2),
          reinterpret_cast<void*>(kExecuteV2)};
}

AttentionCudaStateType GetAttentionCudaStateType() {
  return {&AttentionState::id, const_cast<ffi::TypeInfo*>(&kStateInfo)};
}

int64_t AttentionCudaHostCalls() { return host_calls.load(std::memory_order_relaxed); }

std::string CudaFfiApiVersion() {
  return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
}

}  // namespace jpa
