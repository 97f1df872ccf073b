// Memory that a thread keeps between calls, so that decoding allocates nothing. Portable units only.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace tinyllm {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // At least `bytes` bytes on a cache line, contents undefined; null if there is no memory.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace tinyllm
