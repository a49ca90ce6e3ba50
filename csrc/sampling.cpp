#include "sampling.cuh"

namespace foveate {

void sample(const SampleArguments& arguments, OnHost) {
    sample(arguments, HostRun{arguments.vocab});
}

}  // namespace foveate
