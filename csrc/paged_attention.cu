#include "common/run.cuh"
#include "paged_attention.cuh"

namespace foveate {

void decode_attention(const DecodeArguments& arguments, OnDevice device) {
    decode_attention(arguments, DeviceRun{"decode_attention", device.stream},
                     DeviceRun{"decode_attention (merge)", device.stream});
}

}  // namespace foveate
