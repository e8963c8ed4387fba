# One day in the life of a machine, through the command line alone: `day.sh ARCHITECTURE`, with TRIARCH_ROOT and a template
# `bookworm`. What it prints on standard output must be the same, byte for byte, under every architecture.
set -eu
ARCH=$1
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
cd "$DIR"

part() { printf '\n== %s\n' "$*"; echo "day $ARCH: $*" >&2; }
# in_web COMMAND: as root in the machine, by its shell
in_web() { triarch exec -n web -- sh -c "$1"; }
# refused COMMAND…: it must fail; its message is printed without what differs from run to run
refused() { if "$@" >out 2>&1; then echo "not refused: $*"; cat out; exit 1; fi; sed -n 's/^error: /refused: /p' out; }
# until SCRIPT: wait until it succeeds in the machine
until_in_web() { tries=0; until in_web "$1" >/dev/null 2>&1; do tries=$((tries + 1)); [ $tries -lt 240 ] || { echo "never: $1"; exit 1; }; sleep 0.5; done; }
# field PATH: one value of `triarch info web -o json`
field() { triarch info web -o json | python3 -c 'import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."): value = value[key]
print(json.dumps(value))' "$1"; }

part profiles, networks and the first boot
triarch profile create small memory=384M pids=400 label.role=web env.FROM=profile
triarch network create back --kind isolated --ipv4 10.201.7.0/24 >/dev/null
cat >first.yaml <<END
users: [{name: ann, ssh-keys: ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJu0cQm1m8DkqW0Jw2u0y1L3o8cJcvLxw9sQb9ZP1fWq day"], shell: /bin/sh}]
files: [{path: /etc/day.conf, content: "greeting = good morning\n", mode: "0640"}]
commands: [[sh, -c, "echo first boot >> /root/boots"]]
END
triarch launch bookworm web --as "$ARCH" --profile small --first-boot first.yaml -c env.OWN=machine -p 18080:8000 >/dev/null
until_in_web 'systemctl is-system-running'
in_web 'id -un ann; stat -c "%a %U" /etc/day.conf; cat /etc/day.conf /root/boots; wc -l < /home/ann/.ssh/authorized_keys'
field labels.role; field resources.pids; field profiles

part terminals
triarch exec --user ann --cwd /tmp -e GREETING=hello web -- sh -c 'id -un; pwd; echo $GREETING $FROM $OWN' </dev/null
triarch exec --timeout 1 -n web -- sleep 60 || echo "exit $?"
triarch exec -n web -- sh -c 'echo out; echo err >&2; exit 42' 2>err || echo "exit $?"; cat err
echo 'echo from a login shell of $USER; exit 3' | triarch shell -T --user ann web || echo "exit $?"
triarch exec -n web -- no-such-program >out 2>&1 || echo "exit $?"

part files
mkdir -p tree/deep; echo one >tree/one; ln tree/one tree/hard; ln -s /nowhere tree/link; truncate -s 5M tree/hole; echo end >>tree/hole
chown 33:33 tree/one; chmod 4750 tree/one; touch -d 2001-02-03T04:05:06Z tree/deep; setfattr -n user.note -v kept tree/hole 2>/dev/null || true
triarch file push -r tree web/srv
in_web 'cd /srv/tree; stat -c "%n %a %u:%g %h %s %F" one hard link deep; stat -c %Y deep; sha256sum hole; test $(stat -c %b hole) -lt 100 && echo sparse'
mkdir back; triarch file pull -r web/srv/tree back; diff -r --no-dereference tree back/tree && echo same tree
echo edited | triarch file push - web/srv/edited --mode 600
triarch file pull web/srv/edited -; triarch file list web/srv -o csv | cut -d, -f1-5
in_web 'ln -s /etc /srv/trap'; triarch file pull web/srv/trap/hostname -
triarch file delete web/srv/edited; refused triarch file pull web/srv/edited -

part snapshots
in_web 'echo kept > /root/kept; rm -f /etc/motd; sync'
triarch snapshot create web before >/dev/null
in_web 'echo lost > /root/lost; rm /root/kept; echo new > /etc/motd'
triarch snapshot diff web before -o csv | grep -E '/root/|/etc/motd' || true
triarch set web memory=400M >/dev/null
triarch restore web before >/dev/null
until_in_web 'systemctl is-system-running'
in_web 'cat /root/kept; ls /root/lost 2>&1; ls /etc/motd 2>&1 | tail -1'
field resources.memory_bytes
refused triarch restore web never
triarch copy web/before twin >/dev/null; triarch start twin
same=$(in_web 'cat /etc/machine-id'); tries=0
until other=$(triarch exec -n twin -- cat /etc/machine-id 2>/dev/null) && [ ${#other} = 32 ]; do tries=$((tries + 1)); [ $tries -lt 60 ]; sleep 0.5; done
[ "$same" != "$other" ] && echo another identity
triarch exec -n twin -- cat /root/kept
triarch delete -f twin
triarch export web web.backup >/dev/null
triarch import web.backup brought >/dev/null
triarch info brought -o json | python3 -c 'import json, sys; print(json.load(sys.stdin)["state"])'
python3 -c 'import sys; data = bytearray(open("web.backup", "rb").read()); data[len(data) // 2] ^= 1; open("bad.backup", "wb").write(data)'
refused triarch import bad.backup damaged >/dev/null; echo a damaged backup is refused
triarch delete brought

part limits
triarch set web memory=512M pids=300 disk=11G >/dev/null
field resources.memory_bytes; field resources.pids
refused triarch set web memory=900G
triarch top --once -o csv | cut -d, -f1 | sort
triarch usage web -o json | python3 -c 'import json, sys; rows = json.load(sys.stdin); print(sum(row["cpu_seconds"] for row in rows) > 0)'

part devices
triarch device add web data volume path=/data size=256M >/dev/null
in_web 'mountpoint -q /data && echo mounted; echo on the volume > /data/file; stat -c %U /data/file'
triarch device list web -o csv | cut -d, -f1,2
mkdir folder; echo from the host >folder/host
triarch mount "$DIR/folder" web:/mnt/folder --next-start >/dev/null
triarch restart web; until_in_web 'systemctl is-system-running'
in_web 'test $(df --output=size -B1M / | tail -1) -gt 10500 && echo grown'
in_web 'cat /mnt/folder/host /data/file; echo from the machine > /mnt/folder/machine'
cat folder/machine; stat -c %u folder/machine
triarch unmount web:/mnt/folder >/dev/null
in_web 'test -e /mnt/folder/host || echo unmounted'
triarch device add web eth1 nic network=back address=10.201.7.9 >/dev/null
in_web 'ip -4 -o addr show eth1 | grep -o 10.201.7.9'
triarch device remove web eth1

part networks
cat >page.pl <<'END'
use IO::Socket;
my $server = IO::Socket::INET->new(Listen => 5, LocalPort => 8000, ReuseAddr => 1) or die;
while (my $client = $server->accept) {
    while (<$client>) { last if /^\r?\n/ }
    print $client "HTTP/1.0 200 OK\r\n\r\na page\n";
    close $client;
}
END
triarch file push page.pl web/srv/page.pl
in_web 'systemd-run -q --unit page perl /srv/page.pl'
tries=0; until python3 -c 'import urllib.request as u; print(u.build_opener(u.ProxyHandler({})).open("http://127.0.0.1:18080/page", timeout=3).read().decode().strip())' 2>/dev/null; do tries=$((tries + 1)); [ $tries -lt 40 ] || { echo no page; break; }; sleep 0.5; done
refused triarch create bookworm second --as "$ARCH" -p 18080:80
refused triarch create bookworm second --as "$ARCH" -c network=back -c address=10.9.9.9

part policies
triarch set web restart=on-failure 'health.command=test -e /etc/day.conf' health.interval=1s protected=true
triarch wait --healthy web --timeout 60; echo healthy
refused triarch delete -f web
triarch set web protected=false

part the site as a file
triarch site export >site.yaml
triarch apply -f site.yaml | sed -n '$p'
sed 's/pids: 300/pids: 333/' site.yaml >changed.yaml
triarch apply -f changed.yaml >/dev/null; field resources.pids
printf 'machines:\n  web:\n    memroy: 1G\n' >typo.yaml
refused triarch apply -f typo.yaml

part the end of the day
triarch logs --tail 1 web >/dev/null; triarch info web >/dev/null
triarch stop web; triarch file pull web/root/kept -
triarch delete --dry-run web >/dev/null; triarch delete web
triarch network delete back; triarch profile delete small
triarch list -q
