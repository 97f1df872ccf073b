/* A libcuda that has one kernel, "add": it writes down what it was asked and reads the kernel's
   parameter, as a real driver does when the launch is made. */
#include <string.h>

struct Seen {
  long image, shared_limit, stream;
  unsigned extents[7];
  struct { float* x; long long n; } arguments;
  struct {
    long address, sizes[4], strides[3];
    unsigned box[4], type, rank, interleave, swizzle, promotion, fill;
  } tensor;
} seen;

int cuModuleLoadData(void** module, const char* image) {
  seen.image++;
  *module = &seen;
  return memcmp(image, "\177ELF", 4) ? 200 : 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return module == &seen && !strcmp(name, "add") ? 0 : 500;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  seen.shared_limit = value;
  return function == &seen && attribute == 8 ? 0 : 1;
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  unsigned extents[7] = {gx, gy, gz, bx, by, bz, shared};
  memcpy(seen.extents, extents, sizeof extents);
  memcpy(&seen.arguments, parameters[0], sizeof seen.arguments);
  seen.stream = (long)stream;
  return function == &seen && !extra ? 0 : 1;
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, const unsigned long* sizes,
                           const unsigned long* strides, const unsigned* box, const unsigned* steps,
                           int interleave, int swizzle, int promotion, int fill) {
  seen.tensor.address = (long)address;
  memcpy(seen.tensor.sizes, sizes, sizeof seen.tensor.sizes);
  memcpy(seen.tensor.strides, strides, sizeof seen.tensor.strides);
  memcpy(seen.tensor.box, box, sizeof seen.tensor.box);
  seen.tensor.type = type, seen.tensor.rank = rank, seen.tensor.interleave = interleave;
  seen.tensor.swizzle = swizzle, seen.tensor.promotion = promotion, seen.tensor.fill = fill;
  memset(map, 0x5a, 128);
  return (long)map % 64 || steps[0] * steps[1] * steps[2] * steps[3] != 1;
}

int cuGetErrorString(int code, const char** text) {
  *text = code == 500 ? "named symbol not found" : 0;
  return 0;
}
