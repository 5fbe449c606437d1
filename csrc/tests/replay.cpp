// Makes calls of the library that were recorded on another processor (tests/recorded_calls.py) and writes what they leave
// in memory:   replay ISA CALLS RESULTS
// A file of calls has, in 8-byte words: how many calls; of each its name, its arguments (kind, number or block, offset),
// the blocks of memory (bytes, whether it comes back, contents) and the pointers within them (block, offset, target block,
// offset). Every block ends in front of a page that may not be read. Results: of each call what it returns, and its blocks.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../sparity_kernels.h"

namespace {

[[noreturn]] void stop(const std::string& why) {
  fprintf(stderr, "replay: %s\n", why.c_str());
  exit(1);
}

class File {
 public:
  File(const char* path, const char* mode) : file_(fopen(path, mode)) {
    if (!file_) stop(std::string("cannot open ") + path);
  }
  ~File() { fclose(file_); }
  int64_t word() {
    int64_t value;
    read(&value, sizeof value);
    return value;
  }
  void read(void* to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, file_) != 1) stop("the file of calls ends too early");
  }
  void write(const void* from, size_t bytes) {
    if (bytes && fwrite(from, bytes, 1, file_) != 1) stop("the results cannot be written");
  }

 private:
  FILE* file_;
};

// Memory that ends where the next page may not be touched.
class Block {
 public:
  explicit Block(size_t bytes) : bytes_(bytes), page_(size_t(sysconf(_SC_PAGESIZE))) {
    room_ = (bytes + page_ - 1) / page_ * page_;
    memory_ = static_cast<char*>(mmap(nullptr, room_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + room_, page_, PROT_NONE)) stop("no memory");
  }
  Block(const Block&) = delete;
  Block(Block&& other) : bytes_(other.bytes_), page_(other.page_), room_(other.room_), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  ~Block() {
    if (memory_) munmap(memory_, room_ + page_);
  }
  char* begin() const { return memory_ + room_ - bytes_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, page_, room_;
  char* memory_;
};

struct Arguments {
  std::vector<int64_t> words;

  int64_t operator[](size_t i) const { return words.at(i); }
  template <class T>
  T* at(size_t i) const {
    return reinterpret_cast<T*>(words.at(i));
  }
  float real(size_t i) const {
    double value;
    memcpy(&value, &words.at(i), sizeof value);
    return float(value);
  }
  int threads() const { return int(words.back()); }
};

using Shorts = uint16_t;
const std::map<std::string, std::function<int(const Arguments&)>> kFunctions = {
    {"sparity_quantize",
     [](const Arguments& a) {
       sparity_quantize(a.at<Shorts>(0), a[1], a[2], a.at<int8_t>(3), a.at<float>(4), a.threads());
       return 0;
     }},
    {"sparity_gemv",
     [](const Arguments& a) {
       return sparity_gemv(a.at<SparityMatrix>(0), a.at<Shorts>(1), a.at<void>(2), int(a[3]), a[4], a.threads());
     }},
    {"sparity_gemv_many",
     [](const Arguments& a) {
       return sparity_gemv_many(a.at<const SparityMatrix*>(0), int(a[1]), a.at<const Shorts*>(2), a.at<void*>(3),
                                int(a[4]), a[5], a.threads());
     }},
    {"sparity_gemv_rows",
     [](const Arguments& a) {
       return sparity_gemv_rows(a.at<SparityMatrix>(0), a.at<int32_t>(1), a[2], a.at<Shorts>(3), a.at<void>(4), int(a[5]),
                                a[6], a.threads());
     }},
    {"sparity_gemv_slots",
     [](const Arguments& a) {
       return sparity_gemv_slots(a.at<SparityMatrix>(0), a.at<int32_t>(1), a.at<Shorts>(2), a.at<void>(3), int(a[4]), a[5],
                                 a.threads());
     }},
    {"sparity_unpack",
     [](const Arguments& a) { return sparity_unpack(a.at<SparityMatrix>(0), a[1], a[2], a.at<void>(3), a.threads()); }},
    {"sparity_row_sums",
     [](const Arguments& a) { return sparity_row_sums(a.at<SparityMatrix>(0), a.at<int32_t>(1), a.threads()); }},
    {"sparity_rms_norm",
     [](const Arguments& a) {
       sparity_rms_norm(a.at<Shorts>(0), a.at<Shorts>(1), a.at<Shorts>(2), a.real(3), a[4], a[5], a.at<Shorts>(6),
                        a.threads());
       return 0;
     }},
    {"sparity_gate",
     [](const Arguments& a) {
       sparity_gate(a.at<Shorts>(0), a.at<Shorts>(1), a[2], a.at<Shorts>(3), a.threads());
       return 0;
     }},
    {"sparity_skip",
     [](const Arguments& a) {
       return sparity_skip(a.at<SparitySkip>(0), a.at<Shorts>(1), a.at<uint8_t>(2), a[3], a[4], a.at<Shorts>(5),
                           a.threads());
     }},
    {"sparity_attend",
     [](const Arguments& a) {
       return sparity_attend(a.at<SparityAttention>(0), a.at<Shorts>(1), a.at<Shorts>(2), a.at<Shorts>(3),
                             a.at<Shorts>(4), a.threads());
     }},
    {"sparity_step",
     [](const Arguments& a) {
       return sparity_step(a.at<SparityStep>(0), a.at<SparityBlock>(1), int(a[2]), a.threads());
     }},
    {"sparity_attend_slots",
     [](const Arguments& a) {
       return sparity_attend_slots(a.at<SparityReading>(0), a.at<void>(1), a.at<void>(2), a.threads());
     }},
    {"sparity_choose_pages",
     [](const Arguments& a) {
       return sparity_choose_pages(a.at<SparityJudging>(0), a.at<int32_t>(1), a.at<int64_t>(2), a.threads());
     }},
    {"sparity_attend_blocks",
     [](const Arguments& a) {
       return sparity_attend_blocks(a.at<SparityBlockAttention>(0), a.at<void>(1), a.at<void>(2), a.at<void>(3),
                                    a.at<void>(4), a.threads());
     }},
};

void make_call(File& calls, File& results) {
  std::string name(size_t(calls.word()), ' ');
  calls.read(&name[0], name.size());
  struct Argument {
    int64_t kind, value, offset;  // kind 1: a place in a block
  };
  std::vector<Argument> given(size_t(calls.word()));
  for (Argument& one : given) calls.read(&one, sizeof one);
  std::vector<Block> blocks;
  std::vector<bool> returned;
  for (int64_t count = calls.word(); count > 0; --count) {
    blocks.emplace_back(size_t(calls.word()));
    returned.push_back(calls.word() != 0);
    calls.read(blocks.back().begin(), blocks.back().bytes());
  }
  const auto place = [&](int64_t block, int64_t offset) { return blocks.at(size_t(block)).begin() + offset; };
  for (int64_t count = calls.word(); count > 0; --count) {
    int64_t from[4];
    calls.read(from, sizeof from);
    char* target = place(from[2], from[3]);
    memcpy(place(from[0], from[1]), &target, sizeof target);
  }
  Arguments arguments;
  for (const Argument& one : given)
    arguments.words.push_back(one.kind == 1 ? int64_t(place(one.value, one.offset)) : one.value);
  const auto found = kFunctions.find(name);
  if (found == kFunctions.end()) stop("no function " + name);
  const int64_t status = found->second(arguments);
  results.write(&status, sizeof status);
  for (size_t i = 0; i < blocks.size(); ++i)
    if (returned[i]) results.write(blocks[i].begin(), blocks[i].bytes());
}

int rank_of(const std::string& isa) {
  for (int rank = 0; rank <= sparity_isa_best(); ++rank)
    if (isa == sparity_isa_name(rank)) return rank;
  stop("this processor has no " + isa);
}

}  // namespace

int main(int count, char** given) {
  if (count == 1) {  // the instruction sets, the highest last
    for (int rank = 0; rank <= sparity_isa_best(); ++rank) puts(sparity_isa_name(rank));
    return 0;
  }
  if (count != 4) stop("usage: replay ISA CALLS RESULTS");
  if (sparity_isa_use(rank_of(given[1])) != SPARITY_OK) stop("the library refused the instruction set");
  File calls(given[2], "rb"), results(given[3], "wb");
  for (int64_t left = calls.word(); left > 0; --left) make_call(calls, results);
  return 0;
}
