/* Files, messages, frames and ports. */
#define _GNU_SOURCE
#include "guest.h"
#include "protocol.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

int control_port = -1, report_port = -1;

static void say_line(const char *text) {
    char line[600];
    int size = snprintf(line, sizeof line, "triarch: %s\n", text);
    int console = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    if (write(console < 0 ? 2 : console, line, (size_t)size) < 0)
        errno = 0; /* there is no better place to complain */
    if (console >= 0)
        close(console);
}

void say(const char *format, ...) {
    char text[500];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    say_line(text);
}

void give_up(const char *format, ...) {
    char text[500];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    say_line(text);
    report(FRAME_PROBLEM, text, strlen(text));
    power_off();
}

void power_off(void) {
    write_file("/proc/sys/kernel/printk", "0", 1, 0); /* the kernel's farewell has no place in a command's output */
    sync();
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

char *read_file(const char *path, size_t *size) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return NULL;
    size_t used = 0, room = 4096;
    char *data = malloc(room + 1);
    ssize_t got;
    while (data && (got = read(file, data + used, room - used)) > 0) {
        used += (size_t)got;
        if (used == room)
            data = realloc(data, (room *= 2) + 1);
    }
    close(file);
    if (!data)
        return NULL;
    data[used] = 0;
    if (size)
        *size = used;
    return data;
}

bool write_file(const char *path, const void *data, size_t size, unsigned mode) {
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    if (file < 0)
        return false;
    bool done = write(file, data, size) == (ssize_t)size;
    return close(file) == 0 && done;
}

int open_port(const char *name) {
    DIR *ports = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int port = -1;
    while (ports && port < 0 && (entry = readdir(ports))) {
        char path[300];
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        char *found = read_file(path, NULL);
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        if (found && !strcmp(strtok(found, "\n") ?: "", name))
            port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
        free(found);
    }
    if (ports)
        closedir(ports);
    return port;
}

void put_u32(uint8_t *at, uint32_t value) {
    for (int i = 0; i < 4; i++)
        at[i] = (uint8_t)(value >> (24 - 8 * i));
}

uint32_t get_u32(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

void put_header(uint8_t *frame, uint8_t type, uint32_t size) {
    frame[0] = type;
    put_u32(frame + 1, size);
}

void report(uint8_t type, const void *payload, size_t size) {
    uint8_t frame[HEADER_BYTES + 600];
    put_header(frame, type, (uint32_t)size);
    memcpy(frame + HEADER_BYTES, payload, size);
    /* The file comes first: a host that hears of the end need not let the machine power itself off.
     * The kernel learns a moment after the port itself that the host's file is open. */
    for (int attempt = 0; report_port >= 0 && attempt < 100; attempt++) {
        if (write(report_port, frame, HEADER_BYTES + size) >= 0 || errno != EAGAIN)
            break;
        usleep(10000);
    }
    if (control_port >= 0 && write(control_port, frame, HEADER_BYTES + size) < 0 && errno != EAGAIN)
        say("cannot use the control port: %m");
}

static int mounts_below(const char *root, char *mounts, char **points, int room) {
    size_t length = strlen(root);
    int count = 0;
    for (char *line = strtok(mounts, "\n"); line && count < room; line = strtok(NULL, "\n")) {
        char *point = strchr(line, ' ');
        char *end = point ? strchr(++point, ' ') : NULL;
        if (!end)
            continue;
        *end = 0;
        if (!strncmp(point, root, length) && (point[length] == '/' || !point[length]))
            points[count++] = point;
    }
    return count;
}

bool unmount_tree(const char *root) {
    char *points[512];
    for (int attempt = 0; attempt < 5; attempt++) {
        char *mounts = read_file("/proc/self/mounts", NULL);
        int count = mounts ? mounts_below(root, mounts, points, 512) : 0;
        bool left = false;
        while (count--)
            /* Only the root itself must be gone when this returns: a lazy unmount of it would prove nothing. */
            left |= umount2(points[count], strcmp(points[count], root) ? MNT_DETACH : 0) != 0;
        free(mounts);
        if (!left)
            return true;
        usleep(20000);
    }
    return false;
}

int watch(int epoll, int descriptor, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = descriptor};
    return epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event);
}

int signal_descriptor(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}
