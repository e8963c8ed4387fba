/* The file server: one static program that reads and writes the tree it is started in, on behalf of whoever speaks
 * `guest/file_protocol.py` on its input and output. The same program works inside a VM, inside a container and on the
 * tree of a stopped machine: what keeps it in there is the kernel (its root directory and its namespaces), not this code. */
#ifndef TRIARCH_FILES_H
#define TRIARCH_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#define FILES_VERSION 1
#define FILES_MAX_DATA_BYTES (256 << 10)
#define FILES_MAX_FRAME_BYTES (FILES_MAX_DATA_BYTES + (16 << 10))
/* DATA that is sent to the server need not fit into memory: it may go from the socket to the file as it is. */
#define FILES_MAX_BULK_BYTES (1 << 20)
/* Some files of the kernel have no size and some have no end: more is not read of what says it is empty. */
#define FILES_MAX_UNSIZED_BYTES (1 << 20)
#define FILES_PARTIAL_NAME ".triarch-%016llx.partial"

enum files_type {
    FILES_HELLO = 'V',
    FILES_STAT = 'S',
    FILES_LIST = 'L',
    FILES_GET = 'G',
    FILES_HASH = 'H',
    FILES_REMOVE = 'R',
    FILES_SYNC = 'Y',
    FILES_ENTRY = 'E',
    FILES_DATA = 'D',
    FILES_FINISH = 'F',
    FILES_ERROR = 'X',
    FILES_DONE = 'O',
};

enum files_flag {
    FILES_RECURSIVE = 1,
    FILES_FOLLOW = 2,
    FILES_NO_DATA = 4,
    FILES_SUM = 8,
    FILES_TIMES_ONLY = 16,
};

/* An object of a tree, as both directions describe it. `xattrs` are `count` times name and value, still encoded. */
struct files_entry {
    uint32_t flags;
    char kind; /* f d l h(ard link) p c b s */
    uint32_t mode, uid, gid;
    uint64_t size;
    int64_t seconds;
    uint32_t nanoseconds;
    uint64_t offset, tag;
    const char *path, *target;
    uint16_t xattr_count;
    const uint8_t *xattrs;
    size_t xattrs_size;
};

/* wire.c: frames in, frames out; nothing is written before it is flushed or the buffer is full. */
struct files_frame {
    uint8_t type;
    const uint8_t *at, *end;
    bool bad; /* something was taken that is not there */
};

void wire_open(int in, int out);
bool wire_next(struct files_frame *frame); /* false at the end of input */
size_t wire_left(void);                             /* what is left of a DATA's payload: */
const uint8_t *wire_piece(size_t *size);            /* take some of it, or leave when there is none any more, */
ssize_t wire_splice(int file, uint64_t offset);     /* or move some: 0 when that cannot be, -1 when the file failed */
void wire_flush(void);
void wire_begin(uint8_t type);
void wire_end(void);
void wire_u32(uint32_t value);
void wire_u64(uint64_t value);
void wire_bytes(const void *data, size_t size);
uint8_t *wire_room(size_t size); /* where the caller puts `size` bytes itself, then */
void wire_take(size_t size);     /* keeps so many of them */
void wire_error(int number, const char *path);
void wire_entry(const struct files_entry *entry);
void wire_done(uint64_t count);

uint64_t take_number(struct files_frame *frame, int bytes);
const char *take_path(struct files_frame *frame, char *room); /* PATH_MAX bytes of room; NULL, errno set */
int take_entry(struct files_frame *frame, struct files_entry *entry, char *path, char *target); /* 0 or an errno */

_Noreturn void files_leave(int status); /* the far end is gone */

/* tree.c */
void tree_stat(const char *path, uint32_t flags);
void tree_list(const char *path);
void tree_get(const char *path, uint32_t flags, uint64_t offset);
void tree_hash(const char *path, uint64_t length);
void tree_remove(const char *path, uint32_t flags);

/* put.c */
void put_entry(const struct files_entry *entry);
void put_data(uint64_t offset);
void put_finish(uint64_t size);
void put_abandon(void);

/* sha256.c (FIPS 180-4) */
struct sha256 {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
};
void sha256_begin(struct sha256 *sum);
void sha256_add(struct sha256 *sum, const uint8_t *data, size_t size);
void sha256_end(struct sha256 *sum, uint8_t digest[32]);

/* server.c: serve until the input ends; does not return. The caller is in its root directory already. */
_Noreturn void serve_files(int in, int out);

#endif
