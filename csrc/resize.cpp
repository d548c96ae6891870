#include "resize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "parallel.h"
#include "resize_kernels.h"
#include "resize_weights.h"

namespace fastad {
namespace {

// A strip recomputes the rows it shares with its neighbour: it must be worth waking a thread.
constexpr int kLeastStripRows = 16;
constexpr ptrdiff_t kLeastStripBytes = 1 << 17;
constexpr int kStripsPerThread = 3;

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> levels = {&kScalarKernels};
#ifdef FASTAD_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) levels.push_back(&kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    levels.push_back(&kAvx512Kernels);
  }
#endif
  return levels;
}

std::atomic<const Kernels*> g_kernels{supported().back()};

// One image with its tables: all that the strips of its rows share.
struct Plan {
  const Kernels* kernels;
  ImageView image;
  uint8_t* out;
  int out_height, out_width;
  bool swap_red_blue;
  bool is_crop;
  int crop_x, crop_y;
  std::shared_ptr<const Weights> columns, rows;
};

// Buffers of one thread, kept between calls.
struct Scratch {
  std::vector<uint8_t> ring, row_copies, gray_row;
  std::vector<const uint8_t*> row_pointers, block_pointers;
};

uint8_t* aligned(std::vector<uint8_t>& buffer, size_t size) {
  if (buffer.size() < size + 64) buffer.resize(size + 64);
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~63ull);
}

Plan make_plan(const Kernels* kernels, const ResizeItem& item, int height, int width, bool swap) {
  const ImageView& image = item.image;
  const Axis x = {image.width, item.box.x0, item.box.x1, width};
  const Axis y = {image.height, item.box.y0, item.box.y1, height};
  Plan plan{kernels, image, item.out, height, width, swap, x.is_crop() && y.is_crop(),
            static_cast<int>(x.begin), static_cast<int>(y.begin), nullptr, nullptr};
  if (!plan.is_crop) {
    const Packing packing = image.channels == 1 ? kernels->gray : kernels->color;
    plan.columns = weights_for(x, packing, kernels->digits, 1);
    plan.rows = weights_for(y, {kernels->lanes, 1}, kernels->digits, kernels->lanes);
  }
  return plan;
}

void expand_gray(const uint8_t* gray, int width, uint8_t* out) {
  for (int x = 0; x < width; ++x) {
    out[3 * x] = out[3 * x + 1] = out[3 * x + 2] = gray[x];
  }
}

void copy_rows(const Plan& plan, int begin, int end) {
  const ImageView& image = plan.image;
  const int red = plan.swap_red_blue ? 2 : 0;
  for (int y = begin; y < end; ++y) {
    const uint8_t* from = image.data + image.row_stride * (plan.crop_y + y) +
                          static_cast<ptrdiff_t>(plan.crop_x) * image.channels;
    uint8_t* to = plan.out + static_cast<ptrdiff_t>(y) * plan.out_width * 3;
    if (image.channels == 1) {
      expand_gray(from, plan.out_width, to);
    } else if (image.channels == 3 && red == 0) {
      std::memcpy(to, from, static_cast<size_t>(plan.out_width) * 3);
    } else {
      for (int x = 0; x < plan.out_width; ++x, from += image.channels, to += 3) {
        to[0] = from[red];
        to[1] = from[1];
        to[2] = from[2 - red];
      }
    }
  }
}

// Hands out the rows of one group, copying those that the kernels would read past the image's end.
class RowReader {
 public:
  RowReader(const Plan& plan, Scratch& scratch) : image_(plan.image), scratch_(scratch) {
    const ptrdiff_t taps = plan.columns->first.back() + plan.columns->taps;
    reach_ = taps * image_.channels + kRowPadding;
    row_bytes_ = static_cast<ptrdiff_t>(image_.width) * image_.channels;
    const uint8_t* last_row = image_.data + image_.row_stride * (image_.height - 1);
    end_ = std::max(image_.data, last_row) + row_bytes_;
    rows_ = plan.kernels->group * plan.kernels->lanes;
    scratch_.row_pointers.resize(rows_);
  }

  const uint8_t* const* group(int first_row) {
    const ptrdiff_t copy_bytes = std::max(reach_, row_bytes_);
    for (int i = 0; i < rows_; ++i) {
      // Rows below the image have weight 0.
      const int y = std::min(first_row + i, image_.height - 1);
      const uint8_t* row = image_.data + image_.row_stride * y;
      if (end_ - row < reach_) {
        uint8_t* copy = aligned(scratch_.row_copies, copy_bytes * rows_) + copy_bytes * i;
        std::memcpy(copy, row, row_bytes_);
        row = copy;
      }
      scratch_.row_pointers[i] = row;
    }
    return scratch_.row_pointers.data();
  }

  int rows() const { return rows_; }

 private:
  const ImageView& image_;
  Scratch& scratch_;
  ptrdiff_t reach_, row_bytes_;
  const uint8_t* end_;
  int rows_;
};

// Output rows [begin, end): the horizontal pass runs just ahead of the vertical one, in a ring of
// blocks small enough for the first-level cache.
void resize_rows(const Plan& plan, int begin, int end) {
  static thread_local Scratch scratch;
  const Kernels& kernels = *plan.kernels;
  const Weights& columns = *plan.columns;
  const Weights& rows = *plan.rows;
  RowReader reader(plan, scratch);

  const bool is_gray = plan.image.channels == 1;
  const int positions = plan.out_width * (is_gray ? 1 : 3);
  const ptrdiff_t block_bytes =
      (static_cast<ptrdiff_t>(positions) * kernels.lanes + kBlockPadding + 63) / 64 * 64;
  const int ring_groups = rows.steps / kernels.group + 2;
  const int ring_blocks = ring_groups * kernels.group;
  uint8_t* ring = aligned(scratch.ring, block_bytes * ring_blocks);
  uint8_t* gray_row = aligned(scratch.gray_row, positions);
  scratch.block_pointers.resize(rows.steps);
  const HorizontalPass pass = {columns.first.data(), columns.packed.data(), columns.steps,
                               plan.out_width,       plan.image.channels,   plan.swap_red_blue,
                               plan.image.row_stride * reader.rows()};

  int next_row = rows.first[begin] / reader.rows() * reader.rows();
  for (int y = begin; y < end; ++y) {
    for (; next_row <= rows.last[y]; next_row += reader.rows()) {
      const int slot = next_row / reader.rows() % ring_groups;
      kernels.horizontal(pass, reader.group(next_row), ring + block_bytes * kernels.group * slot,
                         block_bytes);
    }
    const int first_block = rows.first[y] / kernels.lanes;
    for (int s = 0; s < rows.steps; ++s) {
      scratch.block_pointers[s] = ring + block_bytes * ((first_block + s) % ring_blocks);
    }
    uint8_t* out = plan.out + static_cast<ptrdiff_t>(y) * plan.out_width * 3;
    const uint8_t* weights =
        rows.packed.data() + static_cast<ptrdiff_t>(y) * rows.bytes_per_output;
    kernels.vertical(scratch.block_pointers.data(), rows.steps, weights, positions,
                     is_gray ? gray_row : out);
    if (is_gray) expand_gray(gray_row, plan.out_width, out);
  }
}

int strips_per_image(const std::vector<ResizeItem>& items, int height, int width) {
  if (threads() == 1) return 1;
  ptrdiff_t bytes = static_cast<ptrdiff_t>(height) * width * 3;
  for (const ResizeItem& item : items) {
    const ImageView& image = item.image;
    bytes = std::max(bytes, static_cast<ptrdiff_t>(image.height) * image.width * image.channels);
  }
  const int wanted = (threads() * kStripsPerThread - 1) / static_cast<int>(items.size()) + 1;
  const auto worth = static_cast<int>(std::min<ptrdiff_t>(bytes / kLeastStripBytes, wanted));
  return std::max(1, std::min(worth, height / kLeastStripRows));
}

}  // namespace

void resize(const std::vector<ResizeItem>& items, int height, int width, bool swap_red_blue) {
  const Kernels* kernels = g_kernels.load();
  std::vector<Plan> plans;
  plans.reserve(items.size());
  for (const ResizeItem& item : items) {
    plans.push_back(make_plan(kernels, item, height, width, swap_red_blue));
  }
  if (plans.empty()) return;
  const int strips = strips_per_image(items, height, width);
  parallel_for(static_cast<int>(plans.size()) * strips, [&](int task) {
    const Plan& plan = plans[task / strips];
    const int strip = task % strips;
    const int begin = static_cast<int>(static_cast<int64_t>(height) * strip / strips);
    const int end = static_cast<int>(static_cast<int64_t>(height) * (strip + 1) / strips);
    (plan.is_crop ? copy_rows : resize_rows)(plan, begin, end);
  });
}

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

std::string simd_level() { return g_kernels.load()->name; }

bool set_simd_level(const std::string& name) {
  for (const Kernels* kernels : supported()) {
    if (name == kernels->name) {
      g_kernels = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace fastad
