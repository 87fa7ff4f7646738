// Reads experts from files into memory that the caller owns, on threads of its own, so that steps go on meanwhile.
#pragma once
#include "isthmus.h"

// BEGIN SHARED WITH PYTHON
enum { IM_READ_FILE = 1, IM_READ_SHORT = 2, IM_READ_CHECKSUM = 3 };

typedef struct {            // planes of one expert that follow each other in the file
  int64_t offset;           // of the first one
  void *to[3];              // where each plane goes; NULL: not read
  int64_t bytes[3];
  uint32_t checksum[3];     // CRC-32C
  int32_t file, check;      // descriptor; bit p of `check`: plane p is compared with its checksum
  im_expert *expert;
  int32_t tag, drop;        // the caller's own number; whether the page cache shall forget what was read
  int64_t begun;            // the reader's: bytes that are there already
  const int32_t *wanted;    // planes that a layer waits for: when reads that are not urgent are taken back, one that is
  int32_t least;            // under way becomes urgent if that is more than `least`, and else is dropped
} im_read;

typedef struct {
  int64_t bytes, reads, busy_ns, withdrawn;  // busy: while at least one read was under way
  int64_t dropped;                           // bytes that were read in vain, of reads that were not finished
  int32_t failed_tag, failure, error;        // failure: IM_READ_* of the last read that failed, with its errno
  int32_t waiting, under_way;
} im_reader_report;

// bytes_per_second: what a slower device is emulated with, 0 for no limit. NULL: no memory, or no threads.
im_reader *im_reader_new(int threads, int room, double bytes_per_second);
void im_reader_free(im_reader *reader);  // drops what waits, and waits for what is under way
// Queues reads in order, those that are urgent before all others; returns how many there was room for.
int im_reader_ask(im_reader *reader, const im_read *reads, int n, int urgent);
// Takes back reads that are not urgent; returns how many. Those that have begun can be asked for again, and go on.
int im_reader_withdraw(im_reader *reader, im_read *reads);
// The tags of reads that are done, each once; -1 - tag of those that were dropped.
int im_reader_done(im_reader *reader, int32_t *tags, int room);
void im_reader_reports(im_reader *reader, im_reader_report *report);
uint32_t im_crc32c(uint32_t before, const void *data, size_t bytes);
// END SHARED WITH PYTHON

uint32_t im_reader_arrivals(im_reader *reader);
int im_reader_busy(im_reader *reader);  // whether something waits or is under way
// Waits until arrivals are no longer `seen`; 0 when nothing arrived within the time.
int im_reader_wait(im_reader *reader, uint32_t seen, int64_t timeout_ns);
