/* libmetadef.so: the string that the engine's interface takes. */

#include "hixl.h"

namespace ge {
AscendString::AscendString(const char *name)
{
    if (name != nullptr)
        name_ = std::make_shared<std::string>(name);
}

bool AscendString::operator<(const AscendString &other) const
{
    if (!name_ || !other.name_)
        return !name_ && other.name_;
    return *name_ < *other.name_;
}

const char *AscendString::GetString() const
{
    return name_ ? name_->c_str() : "";
}
}  // namespace ge
