#include "paged_attention.cuh"

namespace foveate {

void decode_attention(const DecodeArguments& arguments, OnHost) {
    // An element is what costs as much as one of a plain loop over memory: some 32 multiply-adds.
    std::int64_t pairs = 0;
    for (std::int64_t tile = 0; tile < arguments.num_tiles; ++tile) {
        pairs += std::int64_t{arguments.tiles[tile].keys} * arguments.tiles[tile].columns;
    }
    const std::int64_t tiles = arguments.num_tiles ? arguments.num_tiles : 1;
    const std::int64_t rows = arguments.num_rows ? arguments.num_rows : 1;
    decode_attention(arguments, HostTasks{pairs * arguments.head_dim / (16 * tiles) + 1},
                     HostRun{arguments.head_dim * (arguments.num_parts / rows + 1)});
}

}  // namespace foveate
