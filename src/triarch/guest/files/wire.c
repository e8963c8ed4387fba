/* Frames: a type byte, the payload's length as four bytes, the payload. Numbers are big endian. */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define HEAD 5
#define SPLICE_BYTES (64 << 10)

static int in_fd, out_fd;
static uint8_t input[1 << 20], output[2 * (FILES_MAX_FRAME_BYTES + HEAD)];
static size_t in_start, in_end, out_used, frame_start, left;
/* While large pieces come, no more is read than has to be: what is in the buffer cannot be spliced. */
static bool bulk;
static int between[2] = {-1, -1}; /* the pipe that splice(2) needs */

void wire_open(int in, int out) {
    in_fd = in;
    out_fd = out;
}

static uint64_t number_at(const uint8_t *at, int bytes) {
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

/* Have `size` bytes of input at hand; false at the end of input. */
static bool fill(size_t size) {
    if (in_start + size > sizeof input) {
        memmove(input, input + in_start, in_end - in_start);
        in_end -= in_start;
        in_start = 0;
    }
    while (in_end - in_start < size) {
        wire_flush(); /* whoever waits for an answer may not send more */
        ssize_t got = read(in_fd, input + in_end, bulk ? size - (in_end - in_start) : sizeof input - in_end);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return false;
        in_end += (size_t)got;
    }
    return true;
}

bool wire_next(struct files_frame *frame) {
    if (in_start == in_end)
        in_start = in_end = 0;
    if (!fill(HEAD))
        return false;
    size_t size = number_at(input + in_start + 1, 4);
    bool is_data = input[in_start] == FILES_DATA;
    if (is_data && size >= 8 && size <= FILES_MAX_BULK_BYTES + 8) {
        left = size - 8; /* comes piece by piece */
        bulk = left > FILES_MAX_DATA_BYTES;
        size = 8;
    } else if (is_data || size > FILES_MAX_FRAME_BYTES) {
        return false;
    } else {
        bulk = false;
    }
    if (!fill(HEAD + size))
        return false;
    *frame = (struct files_frame){.type = input[in_start], .at = input + in_start + HEAD};
    frame->end = frame->at + size;
    in_start += HEAD + size;
    return true;
}

size_t wire_left(void) {
    return left;
}

const uint8_t *wire_piece(size_t *size) {
    if (in_start == in_end) {
        in_start = in_end = 0;
        if (!fill(left < SPLICE_BYTES ? left : SPLICE_BYTES))
            files_leave(0);
    }
    *size = in_end - in_start < left ? in_end - in_start : left;
    in_start += *size;
    left -= *size;
    return input + in_start - *size;
}

static bool open_pipe(void) {
    if (between[0] >= 0)
        return true;
    if (pipe2(between, O_CLOEXEC))
        return false;
    fcntl(between[0], F_SETPIPE_SZ, FILES_MAX_BULK_BYTES);
    return true;
}

ssize_t wire_splice(int file, uint64_t offset) {
    static bool refused;
    if (refused || in_start != in_end || left < SPLICE_BYTES || !open_pipe())
        return 0;
    ssize_t got = splice(in_fd, NULL, between[1], NULL, left, 0);
    if (got <= 0) {
        refused = got < 0 && errno == EINVAL; /* neither pipe nor socket */
        return 0;
    }
    left -= (size_t)got;
    loff_t at = (loff_t)offset;
    for (ssize_t moved = 0; moved < got;) {
        ssize_t done = splice(between[0], NULL, file, &at, (size_t)(got - moved), 0);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            int number = done ? errno : ENOSPC;
            close(between[0]);
            close(between[1]);
            between[0] = between[1] = -1;
            errno = number;
            return -1;
        }
        moved += done;
    }
    return got;
}

void wire_flush(void) {
    for (size_t sent = 0; sent < out_used;) {
        ssize_t done = write(out_fd, output + sent, out_used - sent);
        if (done < 0 && errno != EINTR)
            files_leave(1);
        sent += done > 0 ? (size_t)done : 0;
    }
    out_used = 0;
}

void wire_begin(uint8_t type) {
    if (out_used + HEAD + FILES_MAX_FRAME_BYTES > sizeof output)
        wire_flush();
    frame_start = out_used;
    output[out_used] = type;
    out_used += HEAD;
}

void wire_end(void) {
    size_t size = out_used - frame_start - HEAD;
    for (int i = 0; i < 4; i++)
        output[frame_start + 1 + i] = (uint8_t)(size >> (24 - 8 * i));
}

static void put_number(uint64_t value, int bytes) {
    while (bytes--)
        output[out_used++] = (uint8_t)(value >> 8 * bytes);
}

void wire_u32(uint32_t value) {
    put_number(value, 4);
}

void wire_u64(uint64_t value) {
    put_number(value, 8);
}

uint8_t *wire_room(size_t size) {
    return out_used - frame_start - HEAD + size <= FILES_MAX_FRAME_BYTES ? output + out_used : NULL;
}

void wire_take(size_t size) {
    out_used += size;
}

void wire_bytes(const void *data, size_t size) {
    uint8_t *room = wire_room(size);
    if (!room)
        return;
    memcpy(room, data, size);
    wire_take(size);
}

/* An errno, how much room the file system has (only when that ran out), and what it is about. */
void wire_error(int number, const char *path) {
    struct statvfs room;
    bool full = number == ENOSPC || number == EDQUOT;
    wire_begin(FILES_ERROR);
    wire_u32((uint32_t)number);
    wire_u64(full && !statvfs("/", &room) ? (uint64_t)room.f_bavail * room.f_frsize : 0);
    wire_bytes(path, strnlen(path, PATH_MAX));
    wire_end();
}

void wire_done(uint64_t count) {
    wire_begin(FILES_DONE);
    wire_u64(count);
    wire_end();
}

static void put_text(const char *text) {
    size_t size = text ? strlen(text) : 0;
    wire_u32((uint32_t)size);
    wire_bytes(text, size);
}

/* Leaves the frame open: extended attributes follow. */
void wire_entry(const struct files_entry *entry) {
    wire_begin(FILES_ENTRY);
    wire_u32(entry->flags);
    put_number((uint8_t)entry->kind, 1);
    wire_u32(entry->mode);
    wire_u32(entry->uid);
    wire_u32(entry->gid);
    wire_u64(entry->size);
    wire_u64((uint64_t)entry->seconds);
    wire_u32(entry->nanoseconds);
    wire_u64(entry->offset);
    wire_u64(entry->tag);
    put_text(entry->path);
    put_text(entry->target);
}

uint64_t take_number(struct files_frame *frame, int bytes) {
    if (frame->end - frame->at < bytes) {
        frame->bad = true;
        return 0;
    }
    frame->at += bytes;
    return number_at(frame->at - bytes, bytes);
}

static const char *take_text(struct files_frame *frame, size_t size, char *room) {
    errno = EPROTO;
    if (frame->bad || size > (size_t)(frame->end - frame->at))
        return NULL;
    const uint8_t *text = frame->at;
    frame->at += size;
    errno = ENAMETOOLONG;
    if (size >= PATH_MAX)
        return NULL;
    errno = EINVAL;
    if (memchr(text, 0, size))
        return NULL;
    memcpy(room, text, size);
    room[size] = 0;
    return room;
}

const char *take_path(struct files_frame *frame, char *room) {
    const char *path = take_text(frame, (size_t)(frame->end - frame->at), room);
    errno = path && *path != '/' ? EINVAL : errno;
    return path && *path == '/' ? path : NULL;
}

int take_entry(struct files_frame *frame, struct files_entry *entry, char *path, char *target) {
    entry->flags = (uint32_t)take_number(frame, 4);
    entry->kind = (char)take_number(frame, 1);
    entry->mode = (uint32_t)take_number(frame, 4);
    entry->uid = (uint32_t)take_number(frame, 4);
    entry->gid = (uint32_t)take_number(frame, 4);
    entry->size = take_number(frame, 8);
    entry->seconds = (int64_t)take_number(frame, 8);
    entry->nanoseconds = (uint32_t)take_number(frame, 4);
    entry->offset = take_number(frame, 8);
    entry->tag = take_number(frame, 8);
    *path = 0;
    entry->path = path; /* an error names as much of it as there is */
    if (!take_text(frame, take_number(frame, 4), path))
        return errno;
    if (!(entry->target = take_text(frame, take_number(frame, 4), target)))
        return errno;
    entry->xattr_count = (uint16_t)take_number(frame, 2);
    entry->xattrs = frame->at;
    entry->xattrs_size = (size_t)(frame->end - frame->at);
    return frame->bad ? EPROTO : *path == '/' ? 0 : EINVAL;
}
