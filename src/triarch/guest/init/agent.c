/* Supervisors outside the machine's root: SSH over a virtio-serial port, orderly stop of a `system` machine. */
#define _GNU_SOURCE
#include "guest.h"
#include "protocol.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define SYSTEMD_POWEROFF (SIGRTMIN + 4)
#define GRACE_SECONDS 10

/* One direction of the pump; what `to` did not take waits in `buffer`. */
struct flow {
    int from, to;
    size_t start, end;
    char buffer[32768];
};

/* Move all that can be moved without waiting. False when either end is gone. */
static bool pump(struct flow *flow) {
    for (;;) {
        while (flow->start < flow->end) {
            ssize_t done = write(flow->to, flow->buffer + flow->start, flow->end - flow->start);
            if (done < 0)
                return errno == EAGAIN;
            flow->start += (size_t)done;
        }
        ssize_t got = read(flow->from, flow->buffer, sizeof flow->buffer);
        if (got <= 0)
            return got < 0 && errno == EAGAIN;
        flow->start = 0;
        flow->end = (size_t)got;
    }
}

static pid_t start_server(int *connection) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return -1;
    pid_t server = fork();
    if (server == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        dup2(pair[1], 0);
        dup2(pair[1], 1);
        /* systemd's last killing spree spares what begins with '@': sessions may watch the shutdown to its end. */
        execl("/bin/dropbear", "@dropbear", "-i", "-s", "-m", "-r", "/etc/host_key", (char *)NULL);
        _exit(127);
    }
    close(pair[1]);
    fcntl(pair[0], F_SETFL, O_NONBLOCK);
    *connection = pair[0];
    return server;
}

/* dropbear wants a socket (it asks for the peer's name), hence the pump. Edge-triggered: a port without a host reports
 * a hang-up for ever, but only once as an edge, so that waiting for the next client costs nothing. */
static void serve_client(int port) {
    static struct flow in, out;
    int connection = -1, epoll = epoll_create1(EPOLL_CLOEXEC);
    pid_t server = start_server(&connection);
    in = (struct flow){.from = port, .to = connection};
    out = (struct flow){.from = connection, .to = port};
    watch(epoll, port, EPOLLIN | EPOLLOUT | EPOLLET);
    watch(epoll, connection, EPOLLIN | EPOLLOUT | EPOLLET);
    for (bool alive = server > 0; alive;) {
        struct epoll_event event;
        if (epoll_wait(epoll, &event, 1, -1) < 0)
            continue;
        alive = !(event.data.fd == port && event.events & EPOLLHUP) && pump(&in) && pump(&out);
    }
    close(epoll);
    close(connection);
    if (server > 0 && !kill(server, SIGTERM)) /* its end hangs up every session */
        waitpid(server, NULL, 0);
    if (!out.end) {
        say("the agent's SSH server does not start");
        sleep(1);
    }
    while (read(port, in.buffer, sizeof in.buffer) > 0)
        ;
}

static void serve_agent(int port) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    watch(epoll, port, EPOLLIN | EPOLLOUT | EPOLLET);
    for (;;) {
        struct pollfd state = {.fd = port, .events = POLLOUT};
        struct epoll_event event;
        if (poll(&state, 1, 0) > 0 && !(state.revents & POLLHUP))
            serve_client(port);
        else
            epoll_wait(epoll, &event, 1, -1);
    }
}

/* PID 1 ignores a signal it has no handler for yet: systemd is ready for this one once it blocks it. */
static void stop_systemd(void) {
    for (int attempt = 0; attempt < 600; attempt++) {
        char *status = read_file("/proc/1/status", NULL);
        char *blocked = status ? strstr(status, "SigBlk:") : NULL;
        if (blocked && strtoull(blocked + 7, NULL, 16) & 1ULL << (SYSTEMD_POWEROFF - 1))
            break;
        free(status);
        usleep(100000);
    }
    kill(1, SYSTEMD_POWEROFF);
}

/* No other init has an exit hook: end everything but it, put the delta away from here, and power off. */
static void stop_others(void) {
    kill(-1, SIGTERM);
    sleep(GRACE_SECONDS / 5);
    for (int attempt = 0; attempt < GRACE_SECONDS; attempt++) {
        kill(-1, SIGKILL);
        release_volumes();
        sync();
        if (!mount(NULL, "/delta", NULL, MS_REMOUNT | MS_RDONLY, NULL))
            break;
        sleep(1);
    }
    power_off();
}

static void serve_stop(void) {
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    uint8_t frame[HEADER_BYTES + 4];
    size_t have = 0;
    watch(epoll, control_port, EPOLLIN | EPOLLET);
    for (;;) {
        size_t want = have && frame[0] == FRAME_ADAPT ? sizeof frame : HEADER_BYTES;
        ssize_t got = read(control_port, frame + have, want - have);
        if (got <= 0) {
            struct epoll_event event;
            have = 0; /* a frame never straddles two clients */
            epoll_wait(epoll, &event, 1, -1);
        } else if ((have += (size_t)got) == (frame[0] == FRAME_ADAPT ? sizeof frame : HEADER_BYTES)) {
            have = 0;
            if (frame[0] == FRAME_STOP)
                access("/delta/upper", F_OK) ? stop_systemd() : stop_others();
            else if (frame[0] == FRAME_ADAPT)
                adapt(get_u32(frame + HEADER_BYTES));
        }
    }
}

void start_agent(int port, bool app) {
    if (fork() == 0) {
        setsid();
        serve_agent(port);
    }
    if (!app && fork() == 0) {
        setsid();
        serve_stop();
    }
}

/* PID 1 after systemd-shutdown pivoted here: everything has ended, the old root is on /oldroot. */
int exit_hook(int argc, char **argv) {
    const char *verb = argc > 1 ? argv[1] : "poweroff";
    kill(-1, SIGKILL);
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    if (!unmount_tree("/oldroot"))
        say("cannot unmount the machine's root: %m");
    sync();
    if (!strcmp(verb, "reboot"))
        reboot(RB_AUTOBOOT);
    power_off();
}
