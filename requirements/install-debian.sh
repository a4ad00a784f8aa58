#!/bin/sh
# Installs the packages of debian.txt without starting or enabling any of their services.
set -eu
list=$(dirname "$0")/debian.txt
wanted=$(sed 's/#.*//' "$list")
missing=
for package in $wanted; do
    case $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) in
        *' installed') ;;
        *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0

# Packages ask this file whether they may start their service: 101 means no.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes
apt-get -qq update
# shellcheck disable=SC2086 # a list of words is meant
apt-get -qq install -y --no-install-recommends $missing >/dev/null
# Nor at the next boot: the sandbox starts daemons of its own.
if command -v systemctl >/dev/null; then
    for service in slurmctld slurmd slurmdbd munge; do
        case " $missing " in *" $service "*) systemctl disable "$service" >/dev/null 2>&1 || true ;; esac
    done
fi
