# Source me, in bash or zsh, from any folder:  . scripts/env.sh
# Activates .venv and the built workspace that setup.sh made. Sourcing twice does no harm.

_sp_root=${BASH_SOURCE[0]:-${(%):-%x}}
_sp_root=$(cd "$(dirname "$_sp_root")/.." && pwd -P)
_sp_shell=${ZSH_VERSION:+zsh}
_sp_shell=${_sp_shell:-bash}
_sp_ros=$(cut -d, -f1 "$_sp_root/.venv/specprune_ros_kind" 2>/dev/null)

if [ ! -e "$_sp_root/.venv/bin/activate" ] || [ ! -e "$_sp_root/.ws/install/local_setup.sh" ]; then
  echo "not set up yet: run  bash $_sp_root/scripts/setup.sh" >&2
  unset _sp_root _sp_shell _sp_ros
  return 1
fi

if [ -z "${AMENT_PREFIX_PATH:-}" ] && [ -e "/opt/ros/$_sp_ros/setup.$_sp_shell" ]; then
  . "/opt/ros/$_sp_ros/setup.$_sp_shell"
fi
[ "${VIRTUAL_ENV:-}" = "$_sp_root/.venv" ] || . "$_sp_root/.venv/bin/activate"
if [ "$_sp_ros" = wheels ]; then # the venv is the ROS prefix
  case ":${AMENT_PREFIX_PATH:-}:" in
    *":$_sp_root/.venv:"*) ;;
    *) export AMENT_PREFIX_PATH="$_sp_root/.venv${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}" ;;
  esac
fi
# colcon's script calls this Python unquoted: the one behind .venv has no space in its path.
_sp_colcon_python=${COLCON_PYTHON_EXECUTABLE-unset}
export COLCON_PYTHON_EXECUTABLE=$(readlink -f "$_sp_root/.venv/bin/python")
. "$_sp_root/.ws/install/local_setup.$_sp_shell"
_sp_status=$?
if [ "$_sp_colcon_python" = unset ]; then
  unset COLCON_PYTHON_EXECUTABLE
else
  COLCON_PYTHON_EXECUTABLE=$_sp_colcon_python
fi

: "${FASTDDS_DEFAULT_PROFILES_FILE:=$_sp_root/config/fastdds.xml}"
export FASTDDS_DEFAULT_PROFILES_FILE
case ${ROS_DISTRO:-} in
  humble | jazzy) # Fast DDS 2 knows the variable by this name, and Fast DDS 3 warns of it
    : "${FASTRTPS_DEFAULT_PROFILES_FILE:=$FASTDDS_DEFAULT_PROFILES_FILE}"
    export FASTRTPS_DEFAULT_PROFILES_FILE ;;
esac
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"

unset _sp_root _sp_shell _sp_ros _sp_colcon_python
[ "$_sp_status" = 0 ] # what sourcing this file returns
