// The Python module fastad._ext. Arguments were checked in fastad/_native.py; the GIL is released
// around all work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "enlarge.h"
#include "parallel.h"
#include "regions.h"
#include "resize.h"

namespace py = pybind11;

namespace {

using FloatMap = py::array_t<float, py::array::c_style>;
using Mask = py::array_t<bool, py::array::c_style>;
using Labels = py::array_t<int32_t, py::array::c_style>;
using Boxes = std::vector<std::tuple<float, float, float, float>>;

fastad::ImageView view(const py::array& image) {
  return {static_cast<const uint8_t*>(image.data()),
          image.strides(0),
          static_cast<int>(image.shape(0)),
          static_cast<int>(image.shape(1)),
          image.ndim() == 2 ? 1 : static_cast<int>(image.shape(2))};
}

void resize_into(const std::vector<py::array>& images, py::array_t<uint8_t> out, bool swap,
                 const Boxes& boxes) {
  const auto height = static_cast<int>(out.shape(1));
  const auto width = static_cast<int>(out.shape(2));
  uint8_t* data = out.mutable_data();
  std::vector<fastad::ResizeItem> items;
  items.reserve(images.size());
  for (size_t i = 0; i < images.size(); ++i) {
    const auto [x0, y0, x1, y1] = boxes[i];
    items.push_back({view(images[i]), {x0, y0, x1, y1}, data + out.strides(0) * i});
  }
  const py::gil_scoped_release release;
  fastad::resize(items, height, width, swap);
}

FloatMap resize_map(const FloatMap& map, int height, int width) {
  FloatMap out({height, width});
  const float* from = map.data();
  float* to = out.mutable_data();
  const auto in_height = static_cast<int>(map.shape(0));
  const auto in_width = static_cast<int>(map.shape(1));
  const py::gil_scoped_release release;
  fastad::resize_map(from, in_height, in_width, to, height, width);
  return out;
}

fastad::Enlarged enlarged(const FloatMap& map, int height, int width,
                          const std::optional<Mask>& counted) {
  return {map.data(),
          static_cast<int>(map.shape(0)),
          static_cast<int>(map.shape(1)),
          height,
          width,
          counted ? reinterpret_cast<const uint8_t*>(counted->data()) : nullptr};
}

Mask mask_above(const FloatMap& map, int height, int width, double threshold,
                const std::optional<Mask>& counted) {
  Mask mask({height, width});
  const fastad::Enlarged from = enlarged(map, height, width, counted);
  auto* to = reinterpret_cast<uint8_t*>(mask.mutable_data());
  const py::gil_scoped_release release;
  fastad::mask_above(from, threshold, to);
  return mask;
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), values.data());
}

py::tuple regions_above(const FloatMap& map, int height, int width, double threshold,
                        const std::optional<Mask>& counted) {
  fastad::Regions regions;
  const fastad::Enlarged from = enlarged(map, height, width, counted);
  {
    const py::gil_scoped_release release;
    regions = fastad::regions_above(from, threshold);
  }
  const auto count = static_cast<py::ssize_t>(regions.areas.size());
  return py::make_tuple(array_of(regions.boxes, {count, 4}), array_of(regions.areas, {count}),
                        array_of(regions.peaks, {count}), array_of(regions.means, {count}));
}

std::pair<Labels, int> connected_components(const Mask& mask) {
  Labels labels({mask.shape(0), mask.shape(1)});
  const auto* from = reinterpret_cast<const uint8_t*>(mask.data());
  int32_t* to = labels.mutable_data();
  const auto height = static_cast<int>(mask.shape(0));
  const auto width = static_cast<int>(mask.shape(1));
  int count = 0;
  {
    const py::gil_scoped_release release;
    count = fastad::connected_components(from, height, width, to);
  }
  return {std::move(labels), count};
}

void set_simd_level(const std::string& name) {
  if (!fastad::set_simd_level(name)) throw py::value_error("this machine has no level " + name);
}

}  // namespace

PYBIND11_MODULE(_ext, m) {
  m.doc() = "fastad's compiled core; call it through fastad._native, which checks arguments";
  m.def("threads", &fastad::threads);
  m.def("set_threads", &fastad::set_threads, py::call_guard<py::gil_scoped_release>());
  m.def("simd_levels", &fastad::simd_levels);
  m.def("simd_level", &fastad::simd_level);
  m.def("set_simd_level", &set_simd_level);
  m.def("sums_int8_exactly", &fastad::sums_int8_exactly);
  m.def("resize_into", &resize_into);
  m.def("resize_map", &resize_map);
  m.def("mask_above", &mask_above);
  m.def("regions_above", &regions_above);
  m.def("connected_components", &connected_components);
}
