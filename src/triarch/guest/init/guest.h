/* The guest's one program: /init of the initramfs, agent supervisor, exit hook and login shell.
 *
 *   boot.c     PID 1: modules, configuration, disks, overlay, network, then the machine's init or command
 *   network.c  network cards, addresses, routes, name resolution
 *   app.c      PID 1 of an `app` guest: runs the command, carries its input and output, reports its exit
 *   agent.c    supervisor outside the machine's root: SSH over a virtio-serial port, orderly stop
 *   session.c  login shell of that SSH server: enters the machine and executes one request
 *   account.c  whom that runs as
 *   limit.c    and for how long
 *   freeze.c   holding the filesystems still for a clone, setting the clock
 *   adapt.c    takes up what the host plugs in
 *   devices.c  volumes, folders, disks and cards, from the start on or plugged in later
 *   base.c     files, messages, frames and ports
 *
 * The initramfs stays in memory as a hidden root. `/machine` in it leads to the machine's root.
 */
#ifndef TRIARCH_GUEST_H
#define TRIARCH_GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define HEADER_BYTES 5
/* `major:minor` of the delta's disk, in the hidden root. */
#define DELTA_FILE "/etc/delta"

/* The two ports that speak frames; -1 where the host gave none. */
extern int control_port, report_port;

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Say why on the console and to the host, then power off. */
void give_up(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void power_off(void) __attribute__((noreturn));

/* The whole file with a NUL after it, in memory that is never freed; NULL if it cannot be read. */
char *read_file(const char *path, size_t *size);
bool write_file(const char *path, const void *data, size_t size, unsigned mode);
int open_port(const char *name);
void put_header(uint8_t *frame, uint8_t type, uint32_t size);
void put_u32(uint8_t *at, uint32_t value);
uint32_t get_u32(const uint8_t *at);
/* Send a short frame to both ports, the control port only if the host listens there now. */
void report(uint8_t type, const void *payload, size_t size);
/* Unmount `root` and all below it. Unmounting the overlay is what puts the delta's ext4 away. */
bool unmount_tree(const char *root);
int watch(int epoll, int descriptor, uint32_t events);
int signal_descriptor(void);

/* Value number `nth` of `key` in the configuration, NULL if there are fewer. */
char *config(const char *key, int nth);
size_t config_size(const char *key);
int config_count(const char *key);

#define FALLBACK_SHELL "/bin/sh"
#define MAX_GROUPS 65536 /* of the kernel: NGROUPS_MAX */

/* `name` is NULL for a number that the machine's files do not know. */
struct account {
    unsigned uid, gid;
    unsigned *groups;
    size_t group_count;
    const char *name, *home, *shell;
};

/* Look `NAME|UID[:GROUP|GID]` up in this root's files. False for who is not there, which is said on standard error. */
bool find_account(char *wanted, struct account *account);
/* Fork. The child goes on; the parent waits for it, ends its session when the time is over, and never returns. */
void limit_time(unsigned long timeout_ms, unsigned long grace_ms);

void load_modules(const char *list);
/* Cut the next netstring off `*at` and end it with a NUL. NULL at the end or where it is malformed. */
char *next_word(char **at, char *end);
/* The serial number of a disk in /sys/block, empty if it has none; valid until the next call. */
const char *disk_serial(const char *disk);
/* The devices that the configuration names. */
void plug_devices(void);
/* One device, plugged in or out while the machine runs; the exit code. */
int serve_device(char *row, size_t size);
void release_volumes(void);
/* Name and configure a card that has just been plugged in, given as the configuration gives them. */
bool plug_card(const char *text);

void configure_network(void);
/* Name resolution comes from /run, so that neither template nor delta carries an address of this host. */
void configure_names(void);
void configure_resolver(void);
void configure_networkd(void);
void run_app(void) __attribute__((noreturn));
/* Fork the supervisor of the SSH port and, unless PID 1 itself is ours, the one that heeds STOP. */
void start_agent(int port, bool app);
/* Use that many processors, all room on the delta's disk, and tell the host what there is now. */
void adapt(uint32_t processors);
int exit_hook(int argc, char **argv);
int login_shell(int argc, char **argv);
/* Hold all filesystems of the machine still until standard input ends, or for `seconds` after its last byte. */
int freeze_machine(int seconds);
/* `SECONDS[.NANOSECONDS]` since 1970, the nanoseconds with all nine digits. */
int set_clock(const char *seconds);

#endif
