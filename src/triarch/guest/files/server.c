/* Requests, one after the other. Answers come in their order; an object that cannot be written is told at any time. */
#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <limits.h>
#include <linux/capability.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define BIT(capability) (1U << ((capability) & 31))

_Noreturn void files_leave(int status) {
    put_abandon();
    _exit(status);
}

/* Root over this tree's files, and nothing else. */
static void drop_rights(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct kept[2], now[2];
    if (syscall(SYS_capget, &header, now))
        return;
    kept[0].effective = BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_DAC_READ_SEARCH) | BIT(CAP_FOWNER) |
                        BIT(CAP_FSETID) | BIT(CAP_MKNOD) | BIT(CAP_SETFCAP);
    kept[0].effective &= now[0].permitted;
    kept[1].effective = 0;
    for (int i = 0; i < 2; i++) {
        kept[i].permitted = kept[i].effective;
        kept[i].inheritable = 0;
    }
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    syscall(SYS_capset, &header, kept);
}

static void serve(struct files_frame *frame) {
    static char path[PATH_MAX], target[PATH_MAX];
    struct files_entry entry;
    uint64_t number = 0;
    uint32_t flags = 0;
    if (frame->type == FILES_DATA) {
        put_data(take_number(frame, 8));
        return;
    }
    if (frame->type == FILES_FINISH) {
        put_finish(take_number(frame, 8));
        return;
    }
    if (frame->type == FILES_SYNC) {
        wire_done(0);
        return;
    }
    if (frame->type == FILES_ENTRY) {
        int refused = take_entry(frame, &entry, path, target);
        if (refused) {
            put_abandon();
            wire_error(refused, path);
        } else {
            put_entry(&entry);
        }
        return;
    }
    if (frame->type == FILES_STAT || frame->type == FILES_GET || frame->type == FILES_REMOVE)
        flags = (uint32_t)take_number(frame, 4);
    if (frame->type == FILES_GET || frame->type == FILES_HASH)
        number = take_number(frame, 8);
    if (frame->bad || !take_path(frame, path)) {
        wire_error(frame->bad ? EPROTO : errno, "");
        if (frame->type != FILES_STAT && frame->type != FILES_HASH)
            wire_done(0);
    } else if (frame->type == FILES_STAT) {
        tree_stat(path, flags);
    } else if (frame->type == FILES_LIST) {
        tree_list(path);
    } else if (frame->type == FILES_GET) {
        tree_get(path, flags, number);
    } else if (frame->type == FILES_HASH) {
        tree_hash(path, number);
    } else if (frame->type == FILES_REMOVE) {
        tree_remove(path, flags);
    } else {
        files_leave(1);
    }
}

_Noreturn void serve_files(int in, int out) {
    struct files_frame frame;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    umask(0);
    drop_rights();
    wire_open(in, out);
    wire_begin(FILES_HELLO);
    wire_u32(FILES_VERSION);
    wire_end();
    while (wire_next(&frame))
        serve(&frame);
    files_leave(0);
}
