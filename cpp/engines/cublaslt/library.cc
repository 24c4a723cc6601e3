#include "engines/cublaslt/library.h"

#include <dlfcn.h>

#include <mutex>
#include <utility>

namespace jpa::cublaslt {
namespace {

// The library of the header's major version, from the first on that takes arrays of pointers to matrices.
static_assert(CUBLAS_VER_MAJOR == 12 || CUBLAS_VER_MAJOR == 13);
constexpr bool kIs12 = CUBLAS_VER_MAJOR == 12;
constexpr const char* kFile = kIs12 ? "libcublasLt.so.12" : "libcublasLt.so.13";
constexpr const char* kOldest = kIs12 ? "12.9" : "13.0";
constexpr size_t kOldestVersion = kIs12 ? 120900 : 130000;

std::mutex mutex;
std::string directory;  // guarded by mutex
bool loaded = false;    // guarded by mutex
Library the_library;    // written once, before `loaded`

// The copy that the process has, if it has one: two copies of cuBLASLt would each hold their kernels in
// memory.
void* Open(std::string* why_not) {
  if (void* handle = dlopen(kFile, RTLD_NOW | RTLD_NOLOAD)) return handle;
  if (void* handle = dlopen(kFile, RTLD_NOW)) return handle;
  *why_not = dlerror();
  if (directory.empty()) return nullptr;
  if (void* handle = dlopen((directory + "/" + kFile).c_str(), RTLD_NOW)) return handle;
  *why_not += std::string("; ") + dlerror();
  return nullptr;
}

template <typename Function>
void Resolve(void* handle, const char* name, Function* function, std::string* missing) {
  *function = reinterpret_cast<Function>(dlsym(handle, name));
  if (*function == nullptr) *missing += std::string(missing->empty() ? "" : ", ") + name;
}

Status Load(Library* library) {
  std::string why_not;
  void* handle = Open(&why_not);
  if (handle == nullptr) {
    return Status::Internal(std::string("implementation 'cublaslt': expected ") + kFile + " of cuBLAS " +
                            kOldest + " or later (JAX's CUDA plugin brings it), got: " + why_not);
  }
  std::string missing;
  Resolve(handle, "cublasLtGetVersion", &library->GetVersion, &missing);
  Resolve(handle, "cublasLtGetStatusString", &library->GetStatusString, &missing);
  Resolve(handle, "cublasLtCreate", &library->Create, &missing);
  Resolve(handle, "cublasLtMatmul", &library->Matmul, &missing);
  Resolve(handle, "cublasLtMatmulDescCreate", &library->MatmulDescCreate, &missing);
  Resolve(handle, "cublasLtMatmulDescDestroy", &library->MatmulDescDestroy, &missing);
  Resolve(handle, "cublasLtMatmulDescSetAttribute", &library->MatmulDescSetAttribute, &missing);
  Resolve(handle, "cublasLtMatrixLayoutCreate", &library->MatrixLayoutCreate, &missing);
  Resolve(handle, "cublasLtMatrixLayoutDestroy", &library->MatrixLayoutDestroy, &missing);
  Resolve(handle, "cublasLtMatrixLayoutSetAttribute", &library->MatrixLayoutSetAttribute, &missing);
  Resolve(handle, "cublasLtMatmulPreferenceCreate", &library->MatmulPreferenceCreate, &missing);
  Resolve(handle, "cublasLtMatmulPreferenceDestroy", &library->MatmulPreferenceDestroy, &missing);
  Resolve(handle, "cublasLtMatmulPreferenceSetAttribute", &library->MatmulPreferenceSetAttribute, &missing);
  Resolve(handle, "cublasLtMatmulAlgoGetHeuristic", &library->MatmulAlgoGetHeuristic, &missing);
  Resolve(handle, "cublasLtMatmulAlgoConfigGetAttribute", &library->MatmulAlgoConfigGetAttribute, &missing);
  if (!missing.empty()) {
    return Status::Internal(std::string("implementation 'cublaslt': ") + kFile + " lacks " + missing);
  }
  if (const size_t version = library->GetVersion(); version < kOldestVersion) {
    return Status::Internal(std::string("implementation 'cublaslt': expected cuBLASLt ") + kOldest +
                            " or later, got version " + std::to_string(version));
  }
  return Status::Ok();
}

}  // namespace

void SetLibraryDirectory(std::string path) {
  const std::lock_guard<std::mutex> lock(mutex);
  directory = std::move(path);
}

Status GetLibrary(const Library** library) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded) {
    if (Status s = Load(&the_library); !s.ok()) return s;
    loaded = true;
  }
  *library = &the_library;
  return Status::Ok();
}

Status ToStatus(const Library& library, cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return Status::Ok();
  return Status::Internal(std::string("implementation 'cublaslt': ") + what + ": " +
                          library.GetStatusString(status));
}

}  // namespace jpa::cublaslt
