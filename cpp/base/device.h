// File: base/device.h
//
// Where tensors lie and work is done.
#ifndef PYKD_BASE_DEVICE_H_
#define PYKD_BASE_DEVICE_H_

#include <string>

#include "pykd/pykd.h"

namespace pykd::internal {

struct Device {
  pykd_device kind = PYKD_CPU;
  int id = 0;
};

// "cpu", "cuda:0".
inline std::string device_name(Device device) {
  return device.kind == PYKD_CPU ? "cpu" : "cuda:" + std::to_string(device.id);
}

}  // namespace pykd::internal

#endif  // PYKD_BASE_DEVICE_H_
