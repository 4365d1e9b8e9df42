// Makes one call of a kernel's library for a process that cannot load it, as it is for another kind of processor.
//
// Standard input: the number of threads and of regions of memory; each region's address and size in the asking process;
// their bytes. Numbers are int64. The first region is the `Call`, the second its table of tables; what they point to in
// the others is made to point to the copies. Standard output: the bytes of all regions after the call.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "splat/call.hpp"

namespace {

struct Region {
  int64_t address, size;
};

[[noreturn]] void fail(const char* what) {
  fprintf(stderr, "elsewhere: %s\n", what);
  exit(2);
}

void read(void* to, size_t size) {
  if (fread(to, 1, size, stdin) != size) fail("the input is too short");
}

}  // namespace

int main(int, char** arguments) {
  int64_t threads, num_regions;
  read(&threads, sizeof threads), read(&num_regions, sizeof num_regions);
  auto* const regions = new Region[num_regions];
  auto* const copies = new char*[num_regions];
  read(regions, sizeof(Region) * num_regions);
  for (int64_t n = 0; n < num_regions; ++n) read(copies[n] = new char[regions[n].size], regions[n].size);

  auto move = [&](auto& pointer) {
    for (int64_t n = 0; n < num_regions; ++n) {
      const int64_t offset = (int64_t)pointer - regions[n].address;
      if (offset < 0 || offset >= regions[n].size) continue;
      pointer = (decltype(+pointer))(copies[n] + offset);
      return;
    }
    if (pointer) fail("an address is in no region");
  };
  auto* const call = (splat::Call*)copies[0];
  for (splat::Array* one = &call->query; one <= &call->d_value; ++one) move(one->data);
  move(call->kv_lengths), move(call->tables), move(call->num_groups);
  auto** const tables = (void**)copies[1];
  for (size_t n = 0; n < regions[1].size / sizeof *tables; ++n) move(tables[n]);

  void* const library = dlopen(arguments[1], RTLD_NOW);
  if (!library) fail(dlerror());
  auto* const run = (int (*)(const splat::Call*, int, void*))dlsym(library, "splat_run");
  if (!run || run(call, (int)threads, nullptr)) fail("the call failed");
  for (int64_t n = 0; n < num_regions; ++n) fwrite(copies[n], 1, regions[n].size, stdout);
  if (fflush(stdout)) fail("the output cannot be written");
}
