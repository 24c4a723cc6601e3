// Errors of the CUDA engine where cuBLASLt is absent, broken or old; it finds the library once it is there.
// Libraries of tests/cpp/stand_ins/ take its place; STAND_INS is the folder of their folders, OLD and GOOD
// are their versions.
#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "check.h"
#include "engines/cublaslt/library.h"

namespace jpa::test {
namespace {

using cublaslt::GetLibrary;
using cublaslt::Library;
using cublaslt::SetLibraryDirectory;

constexpr int kSkipped = 77;
const std::string kFile = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
const std::string kOldest = CUBLAS_VER_MAJOR == 12 ? "12.9" : "13.0";

std::string ErrorWith(const std::string& directory) {
  SetLibraryDirectory(directory);
  const Library* library = nullptr;
  return GetLibrary(&library).message();
}

bool Has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void Run() {
  const std::string stand_ins = STAND_INS;
  std::string error = ErrorWith("");
  CHECK(Has(error, "expected " + kFile + " of cuBLAS " + kOldest + " or later") &&
            Has(error, "cannot open shared object file"),
        "%s", error.c_str());
  error = ErrorWith("/no/such/folder");
  CHECK(Has(error, "/no/such/folder/" + kFile + ": cannot open"), "%s", error.c_str());

  const std::string garbage = stand_ins + "/garbage";
  std::ofstream(garbage + "/" + kFile) << "no shared object";
  error = ErrorWith(garbage);
  CHECK(Has(error, garbage + "/" + kFile + ": "), "%s", error.c_str());
  error = ErrorWith(stand_ins + "/lacking");
  CHECK(Has(error, "lacks cublasLtMatmulAlgoConfigGetAttribute"), "%s", error.c_str());
  error = ErrorWith(stand_ins + "/old");
  CHECK(Has(error, "expected cuBLASLt " + kOldest + " or later, got version " + std::to_string(OLD)), "%s",
        error.c_str());

  // A failure is not kept.
  SetLibraryDirectory(stand_ins + "/good");
  const Library* library = nullptr;
  CHECK(GetLibrary(&library).ok() && library->GetVersion() == GOOD, "not found where it is");
  const Status status = cublaslt::ToStatus(*library, CUBLAS_STATUS_NOT_INITIALIZED, "a product");
  CHECK(status.message() == "implementation 'cublaslt': a product: a status", "%s", status.message().c_str());
}

}  // namespace
}  // namespace jpa::test

int main() {
  if (dlopen(jpa::test::kFile.c_str(), RTLD_NOW) != nullptr) {
    std::puts("skipped: this machine has cuBLASLt, which goes first");
    return jpa::test::kSkipped;
  }
  jpa::test::Run();
  return jpa::test::failures == 0 ? 0 : 1;
}
