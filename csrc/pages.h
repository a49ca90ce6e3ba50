// The page pool: which pages of the KV cache are in use. No memory is held here, only one bit per page.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace foveate {

using PageId = std::int32_t;

// Fewer pages are free than were asked for.
class OutOfPages : public std::runtime_error {
  public:
    OutOfPages(PageId wanted, PageId num_free);
};

// Pages 0 .. num_pages - 1. Not thread-safe. A call that throws leaves the pool as it was.
class PagePool {
  public:
    // Throws std::invalid_argument if num_pages is negative.
    explicit PagePool(PageId num_pages);

    // The lowest run of n neighbouring free pages if there is one, else the n lowest free pages; ascending.
    // Reads each 64-page word of the map at most twice. Throws OutOfPages if fewer than n pages are free,
    // std::invalid_argument if n is negative.
    std::vector<PageId> allocate(PageId n);

    // Gives pages back, all or none. Throws std::invalid_argument that names a page that is out of range,
    // already free, or given twice.
    void free(const std::vector<PageId>& pages);

    // Throws std::invalid_argument if page is out of range.
    bool is_used(PageId page) const;

    PageId num_pages() const { return num_pages_; }
    PageId num_free() const { return num_free_; }
    PageId num_used() const { return num_pages_ - num_free_; }

  private:
    PageId find_run(PageId n) const;
    std::vector<PageId> lowest_free(PageId n) const;
    void check_range(PageId page) const;
    bool is_free(PageId page) const;
    void flip(PageId page);

    PageId num_pages_;
    PageId num_free_;
    // Bit p % 64 of word p / 64 is set while page p is free; bits past the last page are 0.
    std::vector<std::uint64_t> free_;
};

}  // namespace foveate
